"""What Treering does on one CUDA card: correctness first, then memory, speed and limits. See `__main__`.

Every file of rows has generators that yield a `Figure` as soon as it is measured. They run in a worker process, which
`runner` starts again where a row ends it. `sizes` holds the real shapes and the toy shapes of a dry run, and `device`
is the only file that calls torch.cuda.
"""
