"""PixCorr, SSIM and two-way identification of 982 random image pairs: the published way and ours,
in one run.

    python benchmarks/metrics.py [982]

Pictures of 256 pixels are compared at 425; features are those of AlexNet's second convolution in
size, 184,512 an image. Each way runs in a process of its own, so that the peak memory is its own,
and both print the values, which have to agree.
"""

import multiprocessing
import resource
import sys
import time

import numpy as np
import torch

FEATURES = 184_512


def pictures(n):
    """Random images and noisy versions of them, (n, 3, 256, 256) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 256, 256, generator=generator)
    return images, images.lerp(torch.rand(n, 3, 256, 256, generator=generator), 0.4)


def features(n):
    """Random features (n, features) and noisy versions of them."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(n, FEATURES, generator=generator)
    return real, torch.randn(n, FEATURES, generator=generator).mul_(40).add_(real)


def published(n):
    """The metrics as MindEye's evaluation computes them, by name: functions of two sets."""
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity
    from torchvision.transforms import InterpolationMode, Resize

    enlarge = Resize(425, interpolation=InterpolationMode.BILINEAR, antialias=False)
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1.0,
    }

    def pixcorr(images, recons):
        x, y = enlarge(images).reshape(n, -1), enlarge(recons).reshape(n, -1)
        return np.array([np.corrcoef(a, b)[0][1] for a, b in zip(x, y, strict=True)])

    def ssim(images, recons):
        x, y = (rgb2gray(enlarge(z).permute(0, 2, 3, 1).numpy()) for z in (images, recons))
        return np.array([structural_similarity(b, a, **options) for a, b in zip(x, y, strict=True)])

    def two_way(real, made):
        r = np.corrcoef(real.numpy(), made.numpy())[:n, n:]
        return (r < np.diag(r)).sum(0) / (n - 1)

    return {"PixCorr": pixcorr, "SSIM": ssim, "two-way": two_way}


def ours(n):
    """The same three of src/metrics.py."""
    from src import metrics

    return {"PixCorr": metrics.pixcorr, "SSIM": metrics.ssim, "two-way": metrics.two_way_each}


def measure(way, n, queue):
    """Put (seconds by metric, values by metric, peak memory in GB) into the queue."""
    seconds, values, functions = {}, {}, {"published": published, "ours": ours}[way](n)
    both: tuple | None = pictures(n)
    few = {
        "PixCorr": pictures(4),
        "SSIM": pictures(4),
        "two-way": tuple(x[:, :50] for x in features(4)),
    }
    for name in functions if way == "ours" else ():
        functions[name](
            *few[name]
        )  # compiled at the first use after an installation, not every time
    for name, function in functions.items():
        if name == "two-way":
            both = None  # one pair of sets at a time
            both = features(n)
        begun = time.time()
        values[name] = np.asarray(function(*both))
        seconds[name] = time.time() - begun
    queue.put((seconds, values, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main():
    """Measure both, print the table, and the largest difference of any image's value."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 982
    context, found = multiprocessing.get_context("spawn"), {}
    for way in ("published", "ours"):
        queue = context.Queue()
        process = context.Process(target=measure, args=(way, n, queue))
        process.start()
        found[way] = queue.get()
        process.join()
    for name, seconds in found["published"][0].items():
        mine, off = (
            found["ours"][0][name],
            np.abs(found["published"][1][name] - found["ours"][1][name]).max(),
        )
        print(
            f"{name:8} published {seconds:6.1f} s   ours {mine:5.1f} s   {seconds / mine:5.1f}"
            f" times faster   largest difference {off:.1e}"
        )
    total = {way: sum(found[way][0].values()) for way in found}
    print(
        f"together published {total['published']:6.1f} s   ours {total['ours']:5.1f} s  "
        f" {total['published'] / total['ours']:5.1f} times faster"
    )
    print("peak memory  " + "   ".join(f"{way} {found[way][2]:.1f} GB" for way in found))


if __name__ == "__main__":
    main()
