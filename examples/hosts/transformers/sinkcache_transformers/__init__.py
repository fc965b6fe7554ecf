"""sinkcache's attention and caches for Hugging Face transformers, on CPU: docs/transformers.md.

    import sinkcache_transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sinkcache")
"""

import transformers

from . import build
from .attention import attention, load
from .cache import SinkCache
from .masks import mask

load(build.operators())
transformers.AttentionInterface.register("sinkcache", attention)
transformers.AttentionMaskInterface.register("sinkcache", mask)
