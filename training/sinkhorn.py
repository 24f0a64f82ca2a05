"""Sinkhorn normalisation of the 4 x 4 hyper-connection matrices.

Forty dependent steps on sixteen numbers are all launch overhead in plain PyTorch, so on a GPU they run in one Triton
kernel each way.  The backward kernel repeats the forward pass, keeps the divisors, and walks the steps back.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def sinkhorn_plain(a, iters, eps):
    """a [..., i, j]: softmax over j, then alternating column and row normalisation (columns first and last)."""
    c = a.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


if triton is not None:
    @triton.jit
    def _forward(a_ptr, c_ptr, n, eps, ITERS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, N)
        at = t[:, None, None] * (N * N) + k[None, :, None] * N + k[None, None, :]
        ok = (t < n)[:, None, None]
        x = tl.load(a_ptr + at, mask=ok, other=0.0)
        x = tl.exp(x - tl.max(x, 2)[:, :, None])
        x = x / tl.sum(x, 2)[:, :, None] + eps
        x = x / (tl.sum(x, 1)[:, None, :] + eps)
        for _ in range(ITERS - 1):
            x = x / (tl.sum(x, 2)[:, :, None] + eps)
            x = x / (tl.sum(x, 1)[:, None, :] + eps)
        tl.store(c_ptr + at, x, mask=ok)

    @triton.jit
    def _backward(a_ptr, g_ptr, da_ptr, div_ptr, n, eps, ITERS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, N)
        at = t[:, None, None] * (N * N) + k[None, :, None] * N + k[None, None, :]
        ok = (t < n)[:, None, None]
        vt = t[:, None] * N + k[None, :]                 # one vector of N divisors per step
        okv = (t < n)[:, None]
        step = n * N
        x = tl.load(a_ptr + at, mask=ok, other=0.0)
        x = tl.exp(x - tl.max(x, 2)[:, :, None])
        soft = x / tl.sum(x, 2)[:, :, None]
        x = soft + eps
        d = tl.sum(x, 1) + eps
        tl.store(div_ptr + vt, d, mask=okv)
        x = x / d[:, None, :]
        for i in range(ITERS - 1):
            d = tl.sum(x, 2) + eps
            tl.store(div_ptr + (2 * i + 1) * step + vt, d, mask=okv)
            x = x / d[:, :, None]
            d = tl.sum(x, 1) + eps
            tl.store(div_ptr + (2 * i + 2) * step + vt, d, mask=okv)
            x = x / d[:, None, :]
        tl.debug_barrier()
        g = tl.load(g_ptr + at, mask=ok, other=0.0)
        # y = x / d with d = sum(x) + eps gives dx = (dy - sum(dy * y)) / d, and x itself is y * d
        for r in range(ITERS - 1):
            i = ITERS - 2 - r
            d = tl.load(div_ptr + (2 * i + 2) * step + vt, mask=okv, other=1.0)
            g = (g - tl.sum(g * x, 1)[:, None, :]) / d[:, None, :]
            x = x * d[:, None, :]
            d = tl.load(div_ptr + (2 * i + 1) * step + vt, mask=okv, other=1.0)
            g = (g - tl.sum(g * x, 2)[:, :, None]) / d[:, :, None]
            x = x * d[:, :, None]
        d = tl.load(div_ptr + vt, mask=okv, other=1.0)
        g = (g - tl.sum(g * x, 1)[:, None, :]) / d[:, None, :]
        g = soft * (g - tl.sum(g * soft, 2)[:, :, None])
        tl.store(da_ptr + at, g, mask=ok)

BLOCK = 64


@torch.library.custom_op("ds4::sinkhorn", mutates_args=())
def sinkhorn_op(a: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    a = a.contiguous()
    c = torch.empty_like(a)
    n = a.numel() // a.shape[-1] ** 2
    _forward[(triton.cdiv(n, BLOCK),)](a, c, n, eps, iters, a.shape[-1], BLOCK)
    return c


@sinkhorn_op.register_fake
def _(a, iters, eps):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("ds4::sinkhorn_backward", mutates_args=())
def sinkhorn_backward_op(a: torch.Tensor, g: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    a, g = a.contiguous(), g.contiguous()
    da = torch.empty_like(a)
    width = a.shape[-1]
    n = a.numel() // width ** 2
    div = torch.empty((2 * iters - 1) * n * width, dtype=torch.float32, device=a.device)
    _backward[(triton.cdiv(n, BLOCK),)](a, g, da, div, n, eps, iters, width, BLOCK)
    return da


@sinkhorn_backward_op.register_fake
def _(a, g, iters, eps):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    a, ctx.iters, ctx.eps = inputs
    ctx.save_for_backward(a)


def _grad(ctx, g):
    return sinkhorn_backward_op(ctx.saved_tensors[0], g, ctx.iters, ctx.eps), None, None


sinkhorn_op.register_autograd(_grad, setup_context=_setup)


def sinkhorn(a, iters, eps):
    if a.is_cuda and a.dtype == torch.float32:
        return sinkhorn_op(a, iters, eps)
    return sinkhorn_plain(a, iters, eps)


if __name__ == "__main__":               # GPU check against the plain version
    x = torch.randn(1000, 4, 4, device="cuda") * 2
    g = torch.randn(1000, 4, 4, device="cuda")
    u, v = x.clone().requires_grad_(), x.double().requires_grad_()
    p, q = sinkhorn(u, 20, 1e-6), sinkhorn_plain(v, 20, 1e-6)
    p.backward(g)
    q.backward(g.double())
    e = [(p - q).abs().max().item(), (u.grad - v.grad).abs().max().item()]
    print("sinkhorn kernel error, forward and backward:", e)
    assert max(e) < 1e-4
