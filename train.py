"""Train SANE on a zoo: `accelerate launch train.py recipes/sane-digits.yaml [--trainer.learning_rate 3e-4 ...]`."""

from sane_hf.training import main

if __name__ == "__main__":
    main()
