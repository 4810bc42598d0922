"""FlashAttention-3 of vLLM on the same pages, from the folder $VLLM_SITE."""
import os
import sys


def call(pages):
    """A function that runs it once; an error where there is none."""
    site = os.environ.get("VLLM_SITE")
    if site and site not in sys.path:
        sys.path.append(site)
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    p = pages
    q = p.q.view(-1, p.kv_heads * p.group, p.dim)
    table = p.table.clamp(max=p.keys.shape[0] - 1)
    most_rows, most_context = max(p.rows), max(p.contexts)
    return lambda: flash_attn_varlen_func(q, p.keys, p.values, max_seqlen_q=most_rows, cu_seqlens_q=p.query_start, max_seqlen_k=most_context,
                                          seqused_k=p.context, block_table=table, causal=True, fa_version=3)
