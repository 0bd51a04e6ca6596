"""``python -m flax_attn.convert``: weight files from and to PyTorch's names."""

from flax_attn.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
