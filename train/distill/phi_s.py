"""Statistics of a teacher's features, and the transforms that normalise them (PHI-S, 2410.01680).

Teachers differ in scale by orders of magnitude. Before a loss compares a student with several of
them, each teacher's features x are centred and multiplied by a fixed matrix, z = W (x − μ); the
student's head learns z, and x = Θ z + μ with Θ = W⁻¹ is folded into the head afterwards:

    moments = Moments(dim)
    for images in a_few_hundred_batches:
        moments.update(teacher(images).spatial)
    normalizer = fit("phi_s", moments)            # once, before the first step
    loss = mse(head(student), normalizer(theirs))
    exported = fold_inverse(head.last, normalizer)

A head that predicts x itself gains nothing from a rotation: ‖αR(s − t)‖² = α²‖s − t‖².
"""

from difflib import get_close_matches

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from zoo.train.distill.hadamard import hadamard, has_hadamard, orthogonal

SCALINGS = ("none", "global", "standardize", "alpha_only")
"""Kinds that scale channels one by one: no matrix, no GEMM."""
ROTATIONS = ("phi_s", "pca", "zca", "hadamard_whitening")
"""Kinds that mix channels."""
WHITENINGS = ("pca", "zca", "hadamard_whitening")
"""Kinds that divide by each eigenvalue of the covariance."""
KINDS = SCALINGS + ROTATIONS

FLOOR = 1e-6
"""Least variance that is divided by, relative to the mean over channels: gains end at 1000/φ."""


ROWS_A_CHANNEL = 2
"""Least rows a channel to whiten with. Other rows get n / (n − C) times the variance (independent
normal ones); with C or fewer, where eigenvalues are 0, it is thousands of times as much."""


def check_rows(kind: str, rows: int, dim: int, what: str = "the features") -> None:
    """Refuse to whiten with too few rows to know every eigenvalue of the covariance.

    Args:
        what: Subject of the message.

    Raises:
        ValueError: there are fewer than `ROWS_A_CHANNEL` rows a channel.
    """
    if kind in WHITENINGS and rows < ROWS_A_CHANNEL * dim:
        raise ValueError(
            f"{kind} divides by each of the {dim} eigenvalues of a covariance, and {rows} rows of "
            f"{what} cannot tell them: on other images variances would be off by large factors. It "
            f"needs at least {ROWS_A_CHANNEL * dim} rows ({10 * dim} for variances within about "
            "11 %): calibrate on more images, or choose phi_s or alpha_only, which need few."
        )


class Moments:
    """Running count, mean and covariance of feature rows, in float64.

    Chan's parallel update: `mean` is the mean so far, and `scatter` the sum of the outer products
    of the rows about it. Float64 on every device, since neither TF32 nor autocast touches it;
    calibration happens once. Nothing waits for the device before `covariance`.
    """

    @torch.inference_mode(False)  # else it could only be updated in inference mode
    def __init__(self, dim: int, device: torch.device | str | None = None):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*rows C"]) -> None:
        """Take in a batch of features: each position of each image is a row.

        Raises:
            ValueError: the width is another one than before.
        """
        if x.shape[-1] != len(self.mean):
            raise ValueError(
                f"These statistics are over {len(self.mean)} channels and the features have "
                f"{x.shape[-1]}; keep one Moments a teacher."
            )
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.mean)
        if not len(rows):
            return
        mean = rows.mean(0)
        rows = rows - mean
        self._absorb(torch.full_like(self.n, len(rows)), mean, rows.T @ rows)

    @torch.no_grad()
    def merge(self, other: "Moments") -> "Moments":
        """Add the rows that `other` was given, which stays as it is; return `self`."""
        self._absorb(other.n.to(self.n), other.mean.to(self.mean), other.scatter.to(self.scatter))
        return self

    def _absorb(self, n: Tensor, mean: Tensor, scatter: Tensor) -> None:
        total = (self.n + n).clamp_min(1)  # two empty ones merge into an empty one
        step = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(step * (self.n * n / total), step)
        self.mean += step * (n / total)
        self.n += n

    @torch.no_grad()
    def sums(self, pivot: Float64[Tensor, " C"]) -> Float64[Tensor, "C+1 C+1"]:
        """Return Σ y yᵀ for y = (1, x − pivot): plain sums, which one all-reduce adds over ranks.

        Every rank must use the same pivot. The mean of any one of them (broadcast) is good: far
        from the data, digits cancel. `from_sums` turns the added sums back.
        """
        step = self.mean - pivot
        packed = F.pad(self.scatter, (1, 0, 1, 0))
        y = torch.cat([torch.ones_like(step[:1]), step])
        return packed.addr_(y * self.n, y)

    @classmethod
    @torch.no_grad()
    def from_sums(cls, sums: Float64[Tensor, "D D"], pivot: Float64[Tensor, " C"]) -> "Moments":
        """Undo `sums` (D = C + 1) after they were added over ranks."""
        moments = cls(len(pivot), pivot.device)
        step = sums[0, 1:] / sums[0, 0].clamp_min(1)
        moments.n += sums[0, 0]
        moments.mean += pivot + step
        moments.scatter += sums[1:, 1:] - torch.outer(step, sums[0, 1:])
        return moments

    def covariance(self) -> Float64[Tensor, "C C"]:
        """Return the covariance, with divisor n − 1.

        Raises:
            ValueError: fewer than two rows, or features that are not finite.
        """
        n = int(self.n)
        if n < 2:
            raise ValueError(
                f"A covariance needs at least 2 rows and these statistics have {n}; run the "
                "calibration batches through `update` first (a few thousand rows are enough)."
            )
        if not torch.isfinite(self.scatter).all():
            bad = int((~torch.isfinite(self.scatter.diagonal())).sum())
            raise ValueError(
                f"{bad} of {len(self.mean)} channels had features that are not finite. Run the "
                "teacher in float32 or bfloat16 (float16 overflows), check its weights, and "
                "collect the statistics again."
            )
        return self.scatter / (n - 1)


class Normalizer(nn.Module):
    """A fixed, invertible affine transform of a teacher's features: z = W (x − μ), x = Θ z + μ.

    Made by `fit`; as constructed it is the identity, ready for `load_state_dict`. Its buffers are
    float64 and should stay so, since `fold_inverse` profits; the work itself runs in the input's
    dtype, but in float32 at least and under autocast too, because centring in bfloat16 would
    lose the small channels of a teacher with large means.

    Args:
        kind: One of `KINDS`.
        dim: Width C of the features.

    Raises:
        ValueError: there is no such kind.
    """

    mean: Tensor
    """μ: float64, [C]."""
    weight: Tensor
    """W: [C C] for `ROTATIONS`, its diagonal [C] for `SCALINGS`, which need no GEMM."""
    inverse_weight: Tensor
    """Θ, in the same form; `inverse_matrix()` gives it in full for every kind."""

    def __init__(self, kind: str, dim: int):
        super().__init__()
        if kind not in KINDS:
            near = get_close_matches(str(kind), KINDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"Unknown kind {kind!r}: {hint}There are {', '.join(KINDS)}.")
        self.kind = kind
        self.dim = dim
        ones = torch.ones(dim, dtype=torch.float64)
        identity = ones.diag() if kind in ROTATIONS else ones
        self.register_buffer("mean", torch.zeros_like(ones))
        self.register_buffer("weight", identity)
        self.register_buffer("inverse_weight", identity.clone())

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Balance a teacher's features.

        Raises:
            ValueError: another width than the one it was fitted for.
        """
        x = self._widened(x)
        return _times(self.weight, x - self.mean.to(x.dtype))

    def inverse(self, z: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Bring normalised features back into the teacher's own space.

        Raises:
            ValueError: another width than the one it was fitted for.
        """
        z = self._widened(z)
        return _times(self.inverse_weight, z) + self.mean.to(z.dtype)

    @property
    def matrix(self) -> Float[Tensor, "C C"] | None:
        """W, or `None` for the kinds that only scale."""
        return self.weight if self.weight.ndim == 2 else None

    def inverse_matrix(self) -> Float[Tensor, "C C"]:
        """Return Θ as a full matrix, also for the kinds that only scale."""
        theta = self.inverse_weight
        return theta if theta.ndim == 2 else theta.diag()

    @property
    def shift(self) -> Float[Tensor, " C"]:
        """What the inverse adds: μ."""
        return self.mean

    def extra_repr(self) -> str:
        return f"{self.kind!r}, dim={self.dim}"

    def _widened(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"This normalizer is for {self.dim} channels and got {x.shape[-1]}; was it fitted "
                "on another teacher, or are the features not channels last?"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.inference_mode(False)  # else gradients could not pass through what was fitted
def fit(kind: str, moments: Moments) -> Normalizer:
    """Fit the transform of one kind to a teacher's statistics, in float64.

    PHI-S (2410.01680) and its rivals there, for the covariance Σ = U Λ Uᵀ and φ² = tr Σ / C:

        none                x                      global        (x − mean of μ) / σ of all entries
        standardize         (x − μ) / σ_c          alpha_only    (x − μ) / φ
        phi_s               H Uᵀ (x − μ) / φ       pca           Λ^-½ Uᵀ (x − μ)
        hadamard_whitening  H Λ^-½ Uᵀ (x − μ)      zca           U Λ^-½ Uᵀ (x − μ)

    Eigenvalues ascend, and the largest component of each eigenvector is positive, so the result
    is unique. Variances that get a divisor of their own are at least `FLOOR` φ²: a dead channel
    stays finite and invertible. A width without a Hadamard matrix gets `orthogonal` in its
    place, for PHI-S turned further until every channel has variance 1 there as well.

    Raises:
        ValueError: an unknown kind, fewer than two rows, too few to whiten with (`check_rows`), or
            features that are constant or not finite.
    """
    normalizer = Normalizer(kind, len(moments.mean)).to(moments.mean.device)
    check_rows(kind, int(moments.n), normalizer.dim)
    covariance = moments.covariance()
    variance = covariance.diagonal().mean()  # φ²
    rounding = 1e-12 * moments.mean.abs().max()  # what the mean of equal rows may be off
    if kind != "none" and variance.sqrt() <= rounding:
        raise ValueError(
            f"All {int(moments.n)} rows are the same, so there is nothing to scale; check that "
            "the teacher's weights are loaded and that its images differ."
        )
    if kind in SCALINGS:
        mean, spread = _scaling(kind, moments, covariance.diagonal(), variance)
        normalizer.weight.copy_(1 / spread)
        normalizer.inverse_weight.copy_(spread)
    else:
        mean = moments.mean
        u, spread, left = _rotation(kind, covariance, variance)
        normalizer.weight.copy_((left / spread) @ u.T)
        normalizer.inverse_weight.copy_((u * spread) @ left.T)
    normalizer.mean.copy_(mean)
    return normalizer


def fold_inverse(
    linear: nn.Linear, normalizer: Normalizer, blocks: int = 1, *, forward: bool = False
) -> nn.Linear:
    """Let a head's last layer answer in the teacher's own space: (W', b') → (ΘW', Θb' + μ).

    Computed in float64 and returned in the layer's dtype; `linear` itself stays as it is.

    Args:
        blocks: Vectors that one row makes, u² for a head that up-samples by u. The outputs must
            lie block by block, C channels each (not interleaved as `F.pixel_shuffle` wants them).
        forward: Undo that: let a layer that answers in the teacher's space answer in the balanced
            one.

    Raises:
        ValueError: the layer does not make `blocks` vectors of the normalizer's width.
    """
    if linear.out_features != blocks * normalizer.dim:
        raise ValueError(
            f"The layer has {linear.out_features} outputs, but {blocks} x {normalizer.dim} "
            "channels are to be inverted; give the head's last layer, and its number of blocks."
        )
    weight = linear.weight.detach()
    theta = normalizer.inverse_matrix().to(weight.device, torch.float64)
    mean = normalizer.shift.to(theta)
    if forward:  # z = W (x − μ)
        theta = normalizer.weight.to(theta)
        theta = theta if theta.ndim == 2 else theta.diag()
        mean = -theta @ mean
    rows = weight.to(theta).unflatten(0, (blocks, normalizer.dim))
    offset = mean.repeat(blocks)
    if linear.bias is not None:
        offset += (linear.bias.detach().to(theta).view(blocks, -1) @ theta.T).flatten()
    # made on "meta": an initialisation would draw from the global generator
    sizes = linear.in_features, linear.out_features
    folded = nn.Linear(*sizes, dtype=weight.dtype, device="meta").to_empty(device=weight.device)
    with torch.no_grad():
        folded.weight.copy_((theta @ rows).flatten(0, 1))
        folded.bias.copy_(offset)
    return folded.train(linear.training)


def _scaling(kind: str, moments: Moments, variances: Tensor, variance: Tensor):
    """Return (μ, what each channel is divided by) for a kind of `SCALINGS`."""
    mean = moments.mean
    if kind == "none":
        return torch.zeros_like(mean), torch.ones_like(mean)
    if kind == "alpha_only":
        return mean, variance.sqrt()
    if kind == "standardize":
        return mean, variances.clamp_min(FLOOR * variance).sqrt()
    centre = mean.mean()  # global: all entries are one population
    squares = moments.scatter.diagonal().sum() + moments.n * (mean - centre).square().sum()
    return centre, (squares / (moments.n * len(mean) - 1)).sqrt()


def _rotation(kind: str, covariance: Tensor, variance: Tensor):
    """Return (U, s, L) of W = L diag(1/s) Uᵀ for a kind of `ROTATIONS`."""
    eigenvalues, u = torch.linalg.eigh(covariance)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    u = u * largest.sign()
    if kind == "phi_s":
        return u, variance.sqrt(), _even(eigenvalues.clamp_min(0))
    spread = eigenvalues.clamp_min(FLOOR * variance).sqrt()
    if kind == "pca":
        return u, spread, torch.eye(len(u)).to(u)
    if kind == "zca":
        return u, spread, u
    return u, spread, _even(torch.ones_like(eigenvalues))


def _even(eigenvalues: Float64[Tensor, " C"]) -> Float64[Tensor, "C C"]:
    """Return a rotation R with all of diag(R Λ Rᵀ) equal: Hadamard's, for any Λ, if known."""
    dim = len(eigenvalues)
    if has_hadamard(dim):
        return hadamard(dim).to(eigenvalues)
    rows = _levelled(orthogonal(dim).numpy(), eigenvalues.cpu().numpy())
    return torch.from_numpy(rows).to(eigenvalues)


def _levelled(rows: np.ndarray, eigenvalues: np.ndarray) -> np.ndarray:
    """Turn pairs of rows r until r Λ rᵀ is the mean eigenvalue for each (Bendel & Mickey, 1978).

    Each turn takes the channels of least and of largest variance and settles the first; from a
    random start the angles are small, so the rows stay spread.
    """
    rows = rows.copy()
    target = eigenvalues.mean()
    excess = (rows**2) @ eigenvalues - target
    for _ in range(len(rows) - 1):
        low, high = excess.argmin(), excess.argmax()
        if excess[high] - excess[low] <= 1e-14 * target:
            break
        shared = (rows[low] * eigenvalues) @ rows[high]
        # the smaller root t of: excess[high] t² + 2 shared t + excess[low] = 0
        root = np.sqrt(shared**2 - excess[low] * excess[high])
        tangent = -excess[low] / (shared + np.copysign(root, shared))
        turn = np.array([[1, tangent], [-tangent, 1]]) / np.sqrt(1 + tangent**2)
        rows[[low, high]] = turn @ rows[[low, high]]
        excess[[low, high]] = 0, excess[low] + excess[high]
    return rows


def _times(weight: Float[Tensor, "C C"] | Float[Tensor, " C"], x: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    if weight.ndim == 1:
        return x * weight
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight)
