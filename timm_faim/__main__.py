"""`python -m timm_faim` is `timm-faim`."""

from timm_faim.commands import main

if __name__ == "__main__":
    main()
