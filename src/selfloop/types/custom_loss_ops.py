"""The operations that an uploaded loss may use, as plain names: the gateway checks by them, the engine computes them.

An operation has the names under which a traced graph calls it, and its parameters in order. ``torch`` means the
function of that name in ``torch``, ``F`` for that in ``torch.nn.functional``, ``.`` for the method of tensors; other
names are written out. A parameter is ``kind name``, with ``?`` after the name if it is optional.
"""

from dataclasses import dataclass

KINDS = {
    "t": "a tensor",
    "l": "a list of tensors",
    "o": "a tensor or a number",
    "n": "a number",
    "i": "an integer",
    "b": "true or false",
    "d": "an integer, or a list of them",
    "s": "integers",
    "y": "a dtype",
    "v": "a device",
    "p": "a number, or 'fro'",
    "r": "'none', 'mean' or 'sum'",
    "e": "'constant'",
    "u": "null, 'floor' or 'trunc'",
    "q": "a tensor, or a shape",
    "w": "a tensor, or what an operation gave",
    "x": "integers, slices, null, ... or tensors of integers (choose by a condition with torch.where)",
    "a": "one of shape, dtype, device, ndim, T, mT, values, indices",
    "c": "a dtype, a device or a tensor",
    "k": "anything: it changes nothing",
    "0": "null",
    "f": "false",
}

ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "values", "indices")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")

_OLD = "0 size_average?, 0 reduce?, r reduction?"
_TABLE = f"""
abs: torch . torch.absolute .absolute operator.abs math.fabs | o input
neg: torch . torch.negative .negative operator.neg | o input
pos: torch.positive .positive operator.pos | o input
exp: torch . math.exp | o input
expm1: torch . math.expm1 | o input
log: torch . math.log | o input
log1p: torch . math.log1p | o input
log2: torch . math.log2 | o input
log10: torch . math.log10 | o input
sqrt: torch . math.sqrt | o input
sin: torch . math.sin | o input
cos: torch . math.cos | o input
tanh: torch . math.tanh F | o input
erf: torch . math.erf torch.special.erf | o input
floor: torch . math.floor | o input
ceil: torch . math.ceil | o input
trunc: torch . math.trunc torch.fix .fix | o input
round: torch . | t input
rsqrt: torch . | t input
square: torch . | t input
sigmoid: torch . F torch.special.expit | t input
relu: torch . F | t input, f inplace?
silu: F | t input, f inplace?
gelu: F | t input
softplus: F | t input, n beta?, n threshold?
logsigmoid: F F.log_sigmoid | t input
sign: torch . torch.sgn .sgn | t input
reciprocal: torch . | t input
isnan: torch . | t input
isinf: torch . | t input
isfinite: torch . | t input
logical_not: torch . | t input
nan_to_num: torch . | t input, n nan?, n posinf?, n neginf?
add: torch . operator.add | o input, o other
sub: torch . torch.subtract .subtract operator.sub | o input, o other
mul: torch . torch.multiply .multiply operator.mul | o input, o other
truediv: torch.true_divide .true_divide operator.truediv | o input, o other
div: torch . torch.divide .divide | o input, o other, u rounding_mode?
floor_divide: torch . operator.floordiv | o input, o other
remainder: torch . operator.mod | o input, o other
pow: torch . operator.pow math.pow | o input, o exponent
maximum: torch . torch.fmax .fmax | t input, t other
minimum: torch . torch.fmin .fmin | t input, t other
eq: torch . operator.eq | o input, o other
ne: torch . torch.not_equal .not_equal operator.ne | o input, o other
lt: torch . torch.less .less operator.lt | o input, o other
le: torch . torch.less_equal .less_equal operator.le | o input, o other
gt: torch . torch.greater .greater operator.gt | o input, o other
ge: torch . torch.greater_equal .greater_equal operator.ge | o input, o other
logical_and: torch . | t input, t other
logical_or: torch . | t input, t other
logical_xor: torch . | t input, t other
and_: torch.bitwise_and .bitwise_and operator.and_ | t input, t other
or_: torch.bitwise_or .bitwise_or operator.or_ | t input, t other
xor: torch.bitwise_xor .bitwise_xor operator.xor | t input, t other
invert: torch.bitwise_not .bitwise_not operator.invert | t input
xlogy: torch . torch.special.xlogy | t input, o other
logaddexp: torch . | t input, t other
lerp: torch . | t input, t end, o weight
where: torch | t condition, o input, o other
method_where: .where | t input, t condition, o other
masked_fill: torch . | t input, t mask, o value
clamp: torch . torch.clip .clip | t input, o min?, o max?
clamp_min: torch . | t input, o min
clamp_max: torch . | t input, o max
sum: torch . | t input, d dim?, b keepdim?, y dtype?
mean: torch . | t input, d dim?, b keepdim?, y dtype?
prod: torch . | t input, i dim?, b keepdim?, y dtype?
std: torch . | t input, d dim?, b unbiased?, b keepdim?
var: torch . | t input, d dim?, b unbiased?, b keepdim?
max: torch . | t input, q dim?, b keepdim?
min: torch . | t input, q dim?, b keepdim?
amax: torch . | t input, d dim?, b keepdim?
amin: torch . | t input, d dim?, b keepdim?
argmax: torch . | t input, i dim?, b keepdim?
argmin: torch . | t input, i dim?, b keepdim?
all: torch . | t input, i dim?, b keepdim?
any: torch . | t input, i dim?, b keepdim?
count_nonzero: torch . | t input, d dim?
logsumexp: torch . torch.special.logsumexp | t input, d dim, b keepdim?
norm: torch . | t input, p p?, d dim?, b keepdim?, 0 out?, 0 dtype?
softmax: torch . F torch.special.softmax | t input, i dim, y dtype?, k _stacklevel?
log_softmax: torch . F torch.special.log_softmax | t input, i dim, y dtype?, k _stacklevel?
cumsum: torch . | t input, i dim, y dtype?
cumprod: torch . | t input, i dim, y dtype?
logcumsumexp: torch . | t input, i dim
diff: torch . | t input
sort: torch . | t input, i dim?, b descending?
argsort: torch . | t input, i dim?, b descending?
topk: torch . | t input, i k, i dim?, b largest?
gather: torch . | t input, i dim, t index
index_select: torch . | t input, i dim, t index
take_along_dim: torch . | t input, t indices, i dim
matmul: torch . operator.matmul torch.mm .mm torch.mv .mv torch.bmm .bmm | t input, t other
dot: torch . torch.inner .inner | t input, t other
outer: torch . | t input, t other
reshape: torch . .view | t input, s shape
flatten: torch . | t input, i start_dim?, i end_dim?
squeeze: torch . | t input, d dim?
unsqueeze: torch . | t input, i dim
transpose: torch . torch.swapaxes .swapaxes | t input, i dim0, i dim1
permute: torch . | t input, s dims
t: torch . | t input
expand: . torch.broadcast_to .broadcast_to | t input, s shape
expand_as: . | t input, t other
repeat: . torch.tile .tile | t input, s repeats
repeat_interleave: torch . | t input, i repeats, i dim?
stack: torch | l tensors, i dim?
cat: torch torch.concat torch.concatenate | l tensors, i dim?
split: torch . | t input, d size, i dim?
chunk: torch . | t input, i chunks, i dim?
unbind: torch . | t input, i dim?
narrow: torch . | t input, i dim, i start, i length
select: torch . | t input, i dim, i index
flip: torch . | t input, s dims
roll: torch . | t input, d shifts, d dims?
tril: torch . | t input, i diagonal?
triu: torch . | t input, i diagonal?
diagonal: torch . | t input, i offset?, i dim1?, i dim2?
pad: F | t input, d pad, e mode?, n value?
mse_loss: F | t input, t target, {_OLD}, 0 weight?
l1_loss: F | t input, t target, {_OLD}
smooth_l1_loss: F | t input, t target, {_OLD}, n beta?
huber_loss: F | t input, t target, r reduction?, n delta?, 0 weight?
binary_cross_entropy_with_logits: F | t input, t target, 0 weight?, {_OLD}, 0 pos_weight?
zeros: torch | s size, y dtype?, v device?
ones: torch | s size, y dtype?, v device?
full: torch | d size, n value, y dtype?, v device?
arange: torch | n start, n end?, n step?, y dtype?, v device?
zeros_like: torch | t input, y dtype?, v device?
ones_like: torch | t input, y dtype?, v device?
full_like: torch | t input, n value, y dtype?, v device?
to: . | t input, c other, c dtype?, k non_blocking?, k copy?
type_as: . | t input, t other
float32: .float | t input
float64: .double | t input
int64: .long | t input
int32: .int | t input
bool: . | t input
clone: torch . | t input
detach: torch . | t input
contiguous: . .cpu | t input
size: . | t input, i dim?
dim: . .ndimension | t input
numel: torch . .nelement | t input
getattr: getattr | w input, a name
getitem: operator.getitem | q input, x index
"""


@dataclass(frozen=True, slots=True)
class Parameter:
    kind: str
    name: str
    required: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """An operation's own name, and its parameters in order."""

    name: str
    parameters: tuple[Parameter, ...]


def _parse() -> dict[str, Signature]:
    targets: dict[str, Signature] = {}
    for line in _TABLE.strip().splitlines():
        name, _, rest = line.partition(": ")
        called, _, given = rest.partition(" | ")
        parameters: list[Parameter] = []
        for part in given.split(", "):
            kind, parameter = part.split()
            assert kind in KINDS, line
            parameters.append(Parameter(kind, parameter.removesuffix("?"), not parameter.endswith("?")))
        signature = Signature(name, tuple(parameters))
        for target in called.split():
            short = {"torch": f"torch.{name}", "F": f"F.{name}", ".": f".{name}"}.get(target, target)
            assert short not in targets, short
            targets[short] = signature
    return targets


OPERATIONS: dict[str, Signature] = _parse()
"""Signatures by the name that a graph calls; a method's name begins with a dot."""

_MODULES = (
    ("torch.nn.functional.", "F."),
    ("torch._C._nn.", "F."),
    ("torch._C._special.special_", "torch.special."),
    ("torch.functional.", "torch."),
    ("_operator.", "operator."),
)


def called_name(op: str, target: str) -> str:
    """The key of :data:`OPERATIONS` for a node's target, which need not be there."""
    if op == "call_method":
        return f".{target}"
    for module, short in _MODULES:
        if target.startswith(module):
            return short + target.removeprefix(module)
    return target
