"""Publish FAIM checkpoints on the Hugging Face Hub and keep the book of them in hub_configs/.

timm-faim hub push RUN_DIR --repo ORG/faim_resnet50.my_data
"""

from .package import Release, build_package, save_model
from .publish import publish_run
from .upload import HubError, check_target, push

__all__ = ["HubError", "Release", "build_package", "check_target", "publish_run", "push", "save_model"]
