"""K3: all weights of a model, a launch a layer: readers keep columns (q k v gate up), writers keep rows (o down)."""

from benchmarks import roofline
from benchmarks.cases import DTYPE, SIZE, Case, Rival, compiled, normal, percent_of_ceiling, selection
from red_kernels import gather_many

# layers, d, keys and values, feed-forward, d': Llama-3.2-3B on a GPU
SHAPES = {"gpu": (28, 3072, 1024, 8192, 1536), "cpu": (2, 256, 64, 512, 128), "tiny": (2, 24, 8, 40, 12)}


def test_gather_many(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    layers, width, narrow, hidden, kept = SHAPES[size]
    index = selection(width, kept)
    columns = [(width, width), (narrow, width), (narrow, width), (hidden, width), (hidden, width)]
    rows = [(width, width), (width, hidden)]
    dims = [1] * len(columns) + [0] * len(rows)

    def draw():
        return ([[normal(*shape) for shape in columns + rows] for _ in range(layers)],)

    def each(one):
        return lambda model: [[one(weight, dim) for weight, dim in zip(layer, dims, strict=True)] for layer in model]

    one_hot = (selection(width, width)[:, None] == index).to(DTYPE)
    quick = compiled(lambda layer: [weight.index_select(dim, index) for weight, dim in zip(layer, dims, strict=True)])
    rivals = {
        "index_select": Rival(each(lambda weight, dim: weight.index_select(dim, index))),
        "torch.compile, a call a layer": Rival(quick and (lambda model: [quick(layer) for layer in model]), why_not="on a GPU only"),
        "one-hot product": Rival(each(lambda weight, dim: weight @ one_hot if dim else one_hot.T @ weight)),
    }
    layer = roofline.gather_many(columns, rows, kept, SIZE)
    return [
        Case(
            "gather_many", f"{layers} layers", dict(layers=layers, d=width, kv=narrow, ffn=hidden, kept=kept), roofline.Work(layers * layer.bytes), draw,
            lambda model: [gather_many(layer, [index] * len(dims), dims) for layer in model],
            rivals, "K3", (percent_of_ceiling(85),),
        )
    ]  # fmt: skip
