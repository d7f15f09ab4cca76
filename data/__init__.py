"""Host side: tokenizers, chat templates, sources, packing, batches. numpy only, no jax."""

from configs import check_siblings

check_siblings()
