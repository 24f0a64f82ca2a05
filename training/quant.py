"""Low-precision formats, and their straight-through versions for training.

Forward rounds exactly as the stored or cached value will be rounded; backward passes the gradient through unchanged.
"""
import torch


def pow2_ceil(x):
    """Smallest power of two >= x, for positive normal float32 (bit arithmetic, so it is exact)."""
    bits = x.float().contiguous().view(torch.int32)
    return (((bits + 0x7FFFFF) >> 23) << 23).view(torch.float32)


def e4m3(x):
    """Nearest float8 E4M3 value, ties to even.  |x| must be <= 448."""
    return x.float().to(torch.float8_e4m3fn).float()


def e2m1(x):
    """Nearest FP4 value of {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code.  |x| must be <= 6."""
    a = x.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(torch.round(a / step) * step, x)


def blocks(x, n):
    return x.reshape(*x.shape[:-1], x.shape[-1] // n, n)


def round_fp8(x, n=64):
    """E4M3 with a power-of-two scale per n channels: the key/value rows of the attention cache."""
    y = blocks(x.float(), n)
    s = pow2_ceil(y.abs().amax(-1, keepdim=True).clamp_min(1e-4) * (1 / 448))
    return (e4m3((y / s).clamp(-448, 448)) * s).reshape(x.shape).to(x.dtype)


def round_fp4(x, n=32):
    """E2M1 with a power-of-two scale per n channels: indexer queries and keys."""
    y = blocks(x.float(), n)
    s = pow2_ceil(y.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0 ** -126) * (1 / 6))
    return (e2m1((y / s).clamp(-6, 6)) * s).reshape(x.shape).to(x.dtype)


def dense_scales(w, n=128):
    """Power-of-two scale of each n x n block of a matrix (edge blocks may be smaller)."""
    r, c = w.shape[-2:]
    pad = torch.nn.functional.pad(w.abs(), (0, -c % n, 0, -r % n))
    m = pad.unflatten(-1, (-1, n)).unflatten(-3, (-1, n)).amax((-1, -3))
    return pow2_ceil(m.clamp_min(1e-8) * (1 / 448))


def round_dense(w, n=128):
    """Dense weight as stored: E4M3 with one E8M0 scale per 128 x 128 block."""
    s = dense_scales(w, n).repeat_interleave(n, -2).repeat_interleave(n, -1)[..., :w.shape[-2], :w.shape[-1]]
    return e4m3((w / s).clamp(-448, 448)) * s


def expert_scales(w, n=32):
    """Power-of-two scale per n inputs.  Never clips: the largest magnitude of a group lands on (3, 6]."""
    return pow2_ceil(blocks(w, n).abs().amax(-1).clamp_min(1e-8) * (1 / 6))


def round_expert(w, n=32):
    """Expert weight as stored: E2M1 with one E8M0 scale per 32 inputs."""
    s = expert_scales(w, n)[..., None]
    return (e2m1((blocks(w, n) / s).clamp(-6, 6)) * s).reshape(w.shape)


def round_bf16(w):
    return w.bfloat16().to(w.dtype)


def straight(fn, x):
    """fn(x) forwards, identity backwards.  The sum is exact: fn(x) is zero or within a factor of two of x."""
    with torch.no_grad():
        d = fn(x.detach()) - x.detach()
    return x + d


def hadamard(x):
    """Normalised Walsh-Hadamard transform (Sylvester order) of the last axis, as one small matrix product."""
    n = x.shape[-1]
    h = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return x @ (h * n ** -0.5)
