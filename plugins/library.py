"""The operator library that all plugins register with; programs name its operators `diffusiongemma::…`."""

import torch

LIBRARY = torch.library.Library("diffusiongemma", "DEF")
