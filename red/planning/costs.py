"""What a training step costs, by arithmetic on a teacher's config: parameters, FLOPs, bytes held, bytes sent. No weight is read.

Symbols: teacher width d, student width d', layers L, tokens n of a micro-batch on one GPU. A weight's FLOPs are 2 a token in a forward pass and 4 in a
backward pass. `tests/test_costs.py` holds every formula against real models: parameters exactly, FLOPs against torch's counter, saved bytes against
what autograd saves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from red.planning.gpus import NODE, GPU

BF16, FP32 = 2, 4
LOSS_BUDGET = 960 << 20  # bytes that linear_kd gives to the logits of a chunk and half the head's gradient (red_kernels/triton/launch.py)
CONTEXT = 3 << 29  # bytes outside the allocator: driver context, libraries' workspaces; an allowance
ATTENTION_BACKWARD = 2.5  # of the forward's FLOPs: five products instead of two, one of them the scores again (FlashAttention, arXiv 2205.14135)


@dataclass(frozen=True)
class Sizes:
    """One model's shape, in numbers; `narrowed` is the student's."""

    layers: int
    width: int
    query: int  # heads · head_dim
    key: int  # kv heads · head_dim
    ffn: int
    heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    reader_biases: int  # entries, all layers
    writer_biases: int  # modules of a layer whose bias adds to the stream
    head_norms: int  # entries of the norms of queries and keys, all layers

    @classmethod
    def of(cls, config) -> Sizes:
        """From a transformers config of a family that `red.families` describes."""
        from red import families

        head_dim, heads = families.head_dim(config), config.num_attention_heads
        query, key = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        all_biases, ffn_biases = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
        biases = (query + 2 * key) * (all_biases or config.model_type == "qwen2") + 2 * config.intermediate_size * ffn_biases
        return cls(config.num_hidden_layers, config.hidden_size, query, key, config.intermediate_size, heads, head_dim, config.vocab_size,
                   bool(config.tie_word_embeddings), config.num_hidden_layers * biases, bool(all_biases) + bool(ffn_biases),
                   config.num_hidden_layers * 2 * head_dim * (config.model_type == "qwen3"))

    def narrowed(self, width: int) -> Sizes:
        return Sizes(**{**asdict(self), "width": width})

    @property
    def readers(self) -> int:
        """Output entries of q, k, v, gate and up of one layer."""
        return self.query + 2 * self.key + 2 * self.ffn

    @property
    def layer(self) -> int:
        """Weights of one layer's seven linear modules."""
        return self.width * (self.readers + self.query + self.ffn)

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def multiplied(self) -> int:
        """Weights that multiply each token: the linear modules and the head, not the embedding that is looked up."""
        return self.layers * self.layer + self.head

    @property
    def matrices(self) -> int:
        """Weights that a projection produces: the linear modules, the embedding and, where it is not tied, the head."""
        return self.layers * self.layer + self.head * (1 if self.tied else 2)

    @property
    def gains(self) -> int:
        return (2 * self.layers + 1) * self.width

    @property
    def parameters(self) -> int:
        return self.matrices + self.gains + self.reader_biases + self.layers * self.writer_biases * self.width + self.head_norms

    def attention(self, context: int) -> float:
        """FLOPs a token of the two causal products of attention in a forward pass, over rows of `context` tokens without boundaries inside."""
        return 4 * self.query * (context / 2) * self.layers


def trainable(teacher: Sizes, width: int) -> int:
    """Entries of the projections and gains that the optimiser trains: d·d' a matrix, d' a norm."""
    return teacher.width * width * (7 * teacher.layers + (1 if teacher.tied else 2)) + (2 * teacher.layers + 1) * width


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of one training step."""

    teacher: float  # forward
    student: float  # forward and backward, gradients of all weights included
    attention: float  # of both, student's backward included
    projections: float  # pull-back and push-forward, one product each, once a step
    targets: float  # products of the teacher's outputs with B, where the two output taps need them
    recomputed: float  # what activation checkpointing does a second time

    @property
    def floor(self) -> float:
        return self.teacher + self.student

    @property
    def useful(self) -> float:
        return self.floor + self.attention + self.projections + self.targets

    @property
    def total(self) -> float:
        return self.useful + self.recomputed


def flops(teacher: Sizes, width: int, *, context: int, sharing: int, checkpointing: str = "none", tap_target: str = "gather") -> Flops:
    """FLOPs a token.

    Args:
        context: tokens of a row; documents packed into it make attention cheaper than this.
        sharing: tokens of a step that share one pull-back and push-forward: all micro-batches of the GPUs that shard the work. Plain data parallel does
            it on every GPU anew.
        checkpointing: none, cheap (saves products and attention) or full (saves the layers' inputs).
        tap_target: "gather" of selection starts, or "projected" of the others.
    """
    student = teacher.narrowed(width)
    again = 2 * student.layers * student.layer + student.attention(context) if checkpointing == "full" else 0.0
    return Flops(teacher=2.0 * teacher.multiplied, student=6.0 * student.multiplied,
                 attention=teacher.attention(context) + (1 + ATTENTION_BACKWARD) * student.attention(context),
                 projections=2 * 2.0 * width * teacher.matrices / sharing,
                 targets=2 * 2.0 * teacher.width * width * teacher.layers if tap_target == "projected" else 0.0, recomputed=again)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a micro-batch: the end of the student's forward pass, gradients of earlier ones being there."""

    teacher: int
    student: int
    projections: int
    adam: int  # both moments
    gradients: int  # of the student's weights, fp32
    buckets: int  # a second copy of them, which plain data parallel reduces
    gathered: int  # whole weights of the layers at work, where they are sharded
    taps: int
    activations: int
    loss: int
    context: int
    step_only: int  # gradients of the projections and the largest product: there when taps, activations, loss and gathered weights are not

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.teacher + self.student + self.projections + self.adam + self.gradients + self.buckets + self.context

    @property
    def peak(self) -> int:
        return self.held + max(self.gathered + self.taps + self.activations + self.loss, self.step_only)


def memory(teacher: Sizes, width: int, tokens: int, *, shards: int = 1, replicas: int = 1, whole_gradients: bool = False, checkpointing: str = "none",
           tap_target: str = "gather", student_bytes: int = BF16, teacher_bytes: int = BF16, compute_bytes: int = BF16, chunk: int | None = None) -> Memory:
    """Bytes on each GPU with `tokens` a micro-batch.

    Args:
        shards: GPUs that share one copy of teacher, student, gradients, projections and moments (FSDP2); 1 keeps everything whole.
        replicas: such copies; with shards=1 that is plain data parallel.
        whole_gradients: FSDP2 adds a step's micro-batches up before it reduces, so every GPU holds the sum of all gradients.
        checkpointing, tap_target: as in `flops`.
        student_bytes: of an entry of the student's weights on one GPU: 2, or 4 for fp32 under autocast. Shards are fp32 and gathered in bf16.
        teacher_bytes: of an entry of the teacher's weights.
        compute_bytes: of an entry of what a product returns: 2 in bf16, 4 without autocast (then the student's weights are fp32 too).
        chunk: as in `loss_bytes`.
    """
    student, trained = teacher.narrowed(width), trainable(teacher, width)
    sharded = shards > 1
    cast = 0 if sharded else cast_bytes(student, student_bytes, compute_bytes)
    gathered = 2 * BF16 * (teacher.layer + student.layer) + BF16 * (teacher.matrices - teacher.layers * teacher.layer) + BF16 * (
        student.matrices - student.layers * student.layer) + 2 * FP32 * student.layer if sharded else 0
    return Memory(
        teacher=teacher_bytes * teacher.parameters // shards, student=(FP32 if sharded else student_bytes) * student.parameters // shards + cast,
        projections=FP32 * trained // shards, adam=2 * FP32 * trained // shards, gradients=FP32 * student.parameters // (1 if whole_gradients else shards),
        buckets=FP32 * student.parameters if replicas > 1 and not sharded else 0, gathered=gathered,
        taps=tap_bytes(teacher, width, tokens, checkpointing, tap_target, compute_bytes),
        activations=activation_bytes(student, tokens, checkpointing, student_bytes, compute_bytes),
        loss=loss_bytes(teacher, width, tokens, compute_bytes, chunk), context=CONTEXT,
        step_only=FP32 * trained // shards + FP32 * teacher.vocabulary * width // shards,
    )


def start_bytes(teacher: Sizes, width: int) -> int:
    """What each GPU of a sharded run holds before it shards: whole teacher, fp32 student and projections."""
    return BF16 * teacher.parameters + FP32 * (teacher.narrowed(width).parameters + trainable(teacher, width))


def tap_bytes(teacher: Sizes, width: int, tokens: int, checkpointing: str = "none", tap_target: str = "gather", compute_bytes: int = BF16) -> int:
    """What the taps keep: differences from the student's outputs, each in its target's stead; under full checkpointing the targets themselves wait
    for the backward pass, those of the two writers at the teacher's width where they are gathered from it.
    """
    outputs = 2 * (teacher.width if (checkpointing, tap_target) == ("full", "gather") else width)
    return compute_bytes * tokens * teacher.layers * (teacher.readers + outputs)


def cast_bytes(student: Sizes, student_bytes: int, compute_bytes: int = BF16) -> int:
    """Autocast's copies of the student's weights, kept for the backward pass."""
    return compute_bytes * student.matrices if compute_bytes < student_bytes else 0


def activation_bytes(student: Sizes, tokens: int, checkpointing: str = "none", student_bytes: int = BF16, compute_bytes: int = BF16) -> int:
    """What autograd keeps of the student's layers and its final norm, parameters and taps aside."""
    narrow, query, ffn = student.width, student.query, student.ffn
    if student_bytes == compute_bytes:  # a norm keeps its input in fp32, the normalised stream, and its result, which its readers share
        norms = 2 * (FP32 + 2 * student_bytes) * narrow
    else:  # stream and normalised stream in fp32, and a bf16 copy for each of the five readers
        norms = (2 * (FP32 + FP32) + 5 * compute_bytes) * narrow
    head_norms = FP32 * (query + student.key) if student.head_norms else 0  # their gains are frozen, so the normalised heads need not stay
    outcome = compute_bytes * query + FP32 * student.heads  # of attention, and the logarithms of its sums
    whole = norms + head_norms + compute_bytes * (query + 2 * student.key) + outcome + compute_bytes * 4 * ffn
    stream = student_bytes * narrow
    last = (FP32 + student_bytes) * narrow  # the final norm; its result is counted with the loss
    kept = {"none": whole, "cheap": compute_bytes * (student.readers + 2 * narrow) + outcome + stream, "full": stream}[checkpointing]
    at_work = 0 if checkpointing == "none" else whole
    return tokens * (student.layers * kept + at_work + last)


def loss_bytes(teacher: Sizes, width: int, tokens: int, compute_bytes: int = BF16, chunk: int | None = None) -> int:
    """linear_kd: the head's gradient summed in fp32, both models' logits of one chunk, and the last hidden states with their gradient.

    `chunk` is in tokens; None is what the GPU's kernel takes.
    """
    gradient = FP32 * teacher.vocabulary * width
    rows = chunk_rows(tokens, 2 * BF16 * teacher.vocabulary, gradient // 2) if chunk is None else min(chunk, tokens)
    return gradient + 2 * compute_bytes * rows * teacher.vocabulary + compute_bytes * tokens * (teacher.width + width)


def chunk_rows(tokens: int, row_bytes: int, held: int) -> int:
    """Tokens of a chunk of linear_kd on a GPU: as few equal chunks as fit the budget, in tiles of 128 and at most 2048."""
    most = min(max(max(LOSS_BUDGET - held, LOSS_BUDGET // 4) // row_bytes // 128, 1) * 128, 2048)
    chunks = -(-tokens // most) or 1
    return -(-tokens // (chunks * 128)) * 128 or 128


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU receives in one optimiser step, and the seconds that takes at the links' full rate (latencies not counted)."""

    teacher: float  # gathers of the teacher's weights, once a forward pass
    student: float  # gathers of the student's weights, forward and backward
    gradients: float  # reductions of the student's gradients
    projections: float  # pull-back and push-forward, once a step
    targets: float  # gathers of B, where the two output taps need it
    seconds: float

    @property
    def bytes(self) -> float:
        return self.teacher + self.student + self.gradients + self.projections + self.targets


def traffic(teacher: Sizes, width: int, gpu: GPU, *, shards: int, replicas: int, micro_steps: int, reductions: int = 1, tap_target: str = "gather") -> Traffic:
    """What `red.training.sharding` and data parallel send, with ring collectives.

    A gather or a reduction of x bytes over n GPUs brings (n - 1)/n · x to each, a sum that all receive twice that.
    All weights are sharded by rows: push-forward gathers A for a reader and the teacher's weight for a writer, pull-back reduces A's gradient and gathers
    the writer's weight again. `reductions` of the student's gradients are made in a step: one, or one a micro-batch.
    """
    student, share = teacher.narrowed(width), (shards - 1) / shards
    layers, maps = student.layers * student.layer, teacher.width * width
    readers = FP32 * maps * (5 * teacher.layers + (1 if teacher.tied else 2))
    writers = BF16 * teacher.layers * teacher.width * (teacher.query + teacher.ffn)
    targets = FP32 * 2 * maps * teacher.layers if tap_target == "projected" else 0
    inside = dict(teacher=share * micro_steps * BF16 * teacher.parameters,
                  student=share * micro_steps * BF16 * (2 * layers + student.parameters - layers),  # embedding and head stay from forward to backward
                  gradients=share * reductions * FP32 * student.parameters, projections=share * 2 * (readers + writers), targets=share * micro_steps * targets)
    summed = 2 * FP32 * student.parameters / shards * (replicas - 1) / replicas
    seconds = sum(inside.values()) / rate(gpu, shards, shards) + summed / rate(gpu, replicas, shards * replicas)
    return Traffic(**{**inside, "gradients": inside["gradients"] + summed}, seconds=seconds)


def rate(gpu: GPU, members: int, span: int) -> float:
    """Bytes a second into each GPU of a ring of `members` that lies within `span` GPUs.

    In one node: the link. A ring over whole nodes enters each node once and is spread inside it, so the ports of a node work together; a ring of one GPU a
    node has one GPU's share of them.
    """
    if span <= NODE:
        return gpu.link
    return min(gpu.link, NODE * gpu.network) if members == span else gpu.network
