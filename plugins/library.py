"""The operator library that all plugins register with; programs name its operators `diffusiongemma::…`."""

import torch

NAMESPACE = "diffusiongemma"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
