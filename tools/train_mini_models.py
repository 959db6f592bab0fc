"""Train the miniature of everything that is frozen, and export it to data/mini_models.

    python tools/train_mini_models.py vae --minutes 10          # each stage resumes
    python tools/train_mini_models.py clip --minutes 10
    python tools/train_mini_models.py image --minutes 60 --processes 2
    python tools/train_mini_models.py robust --minutes 25       # from tokens as a decoder's
    python tools/train_mini_models.py text --minutes 12         # text tokens, not image tokens
    python tools/train_mini_models.py variation --minutes 12    # one CLIP embedding, not all tokens
    python tools/train_mini_models.py stable --minutes 6        # the text encoder's hidden states
    python tools/train_mini_models.py unclip --minutes 40       # MindEye2's decoder: patch tokens
    python tools/train_mini_models.py blip --minutes 20         # captions of clear and vague images
    python tools/train_mini_models.py git --minutes 15          # captions from an encoder's tokens
    python tools/train_mini_models.py judge --minutes 5         # the classifier that judges results
    python tools/train_mini_models.py sentence --minutes 4      # sentence embeddings
    python tools/train_mini_models.py gnet --minutes 15 --no-bf16  # the encoder of voxels
    python tools/train_mini_models.py teacher --minutes 12      # for the low level's second loss
    python tools/train_mini_models.py alexnet --minutes 5       # the networks of metrics; likewise
                            # efficientnet_b1, inception_v3, swav_resnet50
    python tools/train_mini_models.py laion_prior --minutes 4   # where the combined model starts
    python tools/train_mini_models.py export                    # writes data/mini_models/
    python tools/train_mini_models.py export_laion_prior        # one model alone; likewise
                            # export_blip, export_unclip, export_git, export_sentence,
                            # export_gnet, export_metric_networks

- The images come from src/miniworld with a seed of their own and only from combinations of object,
  colour and scene that the mini world's training split has: no frozen model has seen a combination
  of the validation or the test set, but for those that only judge results (judge, the networks of
  metrics), which have images of their own.
- Every stage logs its quality on held-out images to train_logs/mini_models/<stage>.jsonl and
  writes a checkpoint every two minutes.
- Latents and tokens are computed once. Diffusion predicts v, with timesteps drawn towards high
  noise, and keeps an average of its weights.

The stages are in tools/mini_models, a module a model.
"""

from mini_models.command import main

if __name__ == "__main__":
    main(__doc__)
