"""`make bench-gpu`: both stages on one CUDA device, beside what its products and its memory can do.

    card         rate of a large bf16 product and of a large copy: the bounds of everything below
    capture      `cache_teacher` with random teachers, compared with the forward pass and the head's product alone
    training     `train_student`, compared with transformers' cross-entropy in the same loop
    head         fused head and loss alone, compared with plain cross-entropy, and with Liger and
                 cut-cross-entropy where they are installed
    selection    targets from logits alone, compared with what copying the logits once takes
    loader       batches from the cache without a model

Head and selection are measured with the Triton kernels and without; everything else takes them if they work on this
card, which the settings of the results say.

Random weights cost what trained ones do, except that sampled targets have nearly the same number of entries at every
position. Results are written after every part, so an interrupted run keeps those it has. A part that fails
is recorded with its error, and the others run. About ten minutes on an H100 or faster; `--quick` runs everything tiny
on any device, as a smoke test.

    python -m benchmarks.gpu
"""
