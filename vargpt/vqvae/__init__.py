"""The image tokenizer: a multi-scale residual VQVAE."""

from vargpt.vqvae.config import VqvaeConfig
from vargpt.vqvae.fold import fold_upsampling
from vargpt.vqvae.model import MultiScaleVQVAE, VqvaeOutput
from vargpt.vqvae.quantizer import MultiScaleQuantizer, Quantized

__all__ = ["MultiScaleQuantizer", "MultiScaleVQVAE", "Quantized", "VqvaeConfig", "VqvaeOutput", "fold_upsampling"]
