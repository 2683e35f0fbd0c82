"""Parts of a training run (`timm_faim.train`), each a module with one job."""
