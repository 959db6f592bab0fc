"""PixCorr, SSIM and two-way identification of 982 random image pairs: the published way and that of
src/metrics.py, in one run.

    python benchmarks/metrics.py [982]

Images of 256 pixels are compared at 425; features are those of AlexNet's second convolution in
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


def make_images(n):
    """Random images and noisy versions of them, (n, 3, 256, 256) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 256, 256, generator=generator)
    return images, images.lerp(torch.rand(n, 3, 256, 256, generator=generator), 0.4)


def make_features(n):
    """Random features (n, features) and noisy versions of them."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(n, FEATURES, generator=generator)
    return real, torch.randn(n, FEATURES, generator=generator).mul_(40).add_(real)


def list_published_metrics(n):
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
        values = []
        for image, recon in zip(enlarge(images), enlarge(recons), strict=True):
            values.append(np.corrcoef(image.flatten(), recon.flatten())[0][1])
        return np.array(values)

    def ssim(images, recons):
        grey_images = rgb2gray(enlarge(images).permute(0, 2, 3, 1).numpy())
        grey_recons = rgb2gray(enlarge(recons).permute(0, 2, 3, 1).numpy())
        values = []
        for image, recon in zip(grey_images, grey_recons, strict=True):
            values.append(structural_similarity(recon, image, **options))
        return np.array(values)

    def two_way(real, recon):
        r = np.corrcoef(real.numpy(), recon.numpy())[:n, n:]
        return (r < np.diag(r)).sum(0) / (n - 1)

    return {"PixCorr": pixcorr, "SSIM": ssim, "two-way": two_way}


def list_metrics(n):
    """The same three of src/metrics.py."""
    from src import metrics

    return {"PixCorr": metrics.pixcorr, "SSIM": metrics.ssim, "two-way": metrics.two_way_each}


METRICS = {"published": list_published_metrics, "ours": list_metrics}


def measure(way, n, queue):
    """Put (seconds by metric, values by metric, peak memory in GB) into the queue."""
    seconds, values, functions = {}, {}, METRICS[way](n)
    pair: tuple | None = make_images(n)
    small = {
        "PixCorr": make_images(4),
        "SSIM": make_images(4),
        "two-way": tuple(x[:, :50] for x in make_features(4)),
    }
    for name in functions if way == "ours" else ():
        functions[name](
            *small[name]
        )  # compiled at the first use after an installation, not every time
    for name, function in functions.items():
        if name == "two-way":
            pair = None  # one pair of sets at a time
            pair = make_features(n)
        start_time = time.time()
        values[name] = np.asarray(function(*pair))
        seconds[name] = time.time() - start_time
    queue.put((seconds, values, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main():
    """Measure both, print the table, and the largest difference of any image's value."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 982
    context, results = multiprocessing.get_context("spawn"), {}
    for way in ("published", "ours"):
        queue = context.Queue()
        process = context.Process(target=measure, args=(way, n, queue))
        process.start()
        results[way] = queue.get()
        process.join()
    for name, seconds in results["published"][0].items():
        our_seconds = results["ours"][0][name]
        difference = np.abs(results["published"][1][name] - results["ours"][1][name]).max()
        print(
            f"{name:8} published {seconds:6.1f} s   ours {our_seconds:5.1f} s  "
            f" {seconds / our_seconds:5.1f} times faster   largest difference {difference:.1e}"
        )
    total = {way: sum(results[way][0].values()) for way in results}
    print(
        f"together published {total['published']:6.1f} s   ours {total['ours']:5.1f} s  "
        f" {total['published'] / total['ours']:5.1f} times faster"
    )
    print("peak memory  " + "   ".join(f"{way} {results[way][2]:.1f} GB" for way in results))


if __name__ == "__main__":
    main()
