"""Weight matrices: one value for the weight of a linear layer, a stack of experts, or one expert of a stack.

y = W x with W_NM, N outputs × M inputs. The plain parameter stores W as it is, or as M × N (`transposed`: transformers'
Conv1D, the experts of gpt_oss). Experts are stacked along dimension 0: E × N × M, or E × M × N.

    for matrix in matrices(anatomy):             # every linear layer and every stack, in the model's order
        W = matrix.view(parameter)               # […, N, M], whatever the parameter looks like
        for one in matrix.each():                # one linear layer, or each expert
            one.write(parameter, one.view(parameter) + change_NM)

Importing this module does not import torch.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from treering.anatomy.parts import Anatomy, Experts, Linear, Role

if TYPE_CHECKING:
    from torch import Tensor

ADAPTED: tuple[Role, ...] = ("attention", "mlp", "experts")  # what `all-linear` means, inside the blocks: no routers


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The weight of a linear layer, a stack of experts' weights, or, with `expert`, one of the stack.

    Attributes:
        weight: the plain parameter that holds it.
        module: the module that holds the parameter.
        outputs, inputs: N and M, of one matrix.
        experts: how many matrices the parameter stacks; None: it holds one.
        expert: which of them this is; None: all of them.
        transposed: the parameter stores inputs before outputs.
    """

    weight: str
    module: str
    outputs: int
    inputs: int
    experts: int | None
    transposed: bool
    block: int | None
    role: Role
    expert: int | None = None

    @property
    def name(self) -> str:
        """A name unique in the model: the parameter's name, and for one expert its number (`….down_proj[3]`)."""
        return self.weight if self.expert is None else f"{self.weight}[{self.expert}]"

    @property
    def leaf(self) -> str:
        """The parameter's name inside its module."""
        return self.weight.rpartition(".")[2]

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before N × M: (E,) for a complete stack, else ()."""
        return () if self.experts is None or self.expert is not None else (self.experts,)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored: of the parameter, or of one expert's slice of it."""
        return (*self.lead, *((self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)))

    @property
    def input_moment(self) -> tuple[int, ...]:
        """The shape of A = E[x xᵀ]: M × M, or E × M × M."""
        return (*self.lead, self.inputs, self.inputs)

    @property
    def rank(self) -> int:
        return min(self.outputs, self.inputs)

    @property
    def numel(self) -> int:
        """The number of elements of all its matrices."""
        return (self.lead[0] if self.lead else 1) * self.outputs * self.inputs

    def each(self) -> "tuple[Matrix, ...]":
        """Return one Matrix for each expert of a stack; of anything else itself."""
        if not self.lead:
            return (self,)
        return tuple(replace(self, expert=i) for i in range(self.lead[0]))

    def view(self, parameter: "Tensor") -> "Tensor":
        """Return W, […, N, M], as a view of the complete parameter."""
        return self.oriented(parameter if self.expert is None else parameter[self.expert])

    def write(self, parameter: "Tensor", W: "Tensor") -> None:
        """Copy W, […, N, M], to where it lies in the complete parameter, cast to its dtype."""
        self.view(parameter).copy_(W)

    def oriented(self, value: "Tensor") -> "Tensor":
        """Return […, N, M] of what is stored, or what is stored of […, N, M]: a view, its own inverse."""
        return value.mT if self.transposed else value


def of_linear(linear: Linear) -> Matrix:
    """Return the matrix of a linear layer."""
    return Matrix(
        weight=linear.weight,
        module=linear.fqn,
        outputs=linear.outputs,
        inputs=linear.inputs,
        experts=None,
        transposed=linear.transposed,
        block=linear.block,
        role=linear.role,
    )


def of_experts(anatomy: Anatomy, experts: Experts) -> tuple[Matrix, ...]:
    """Return the stacks of one experts module, in the order of its parameters."""
    stacks = []
    for name in experts.stacked:
        _, first, second = anatomy.parameters[name].shape
        outputs, inputs = (second, first) if experts.transposed else (first, second)
        stacks.append(
            Matrix(
                weight=name,
                module=experts.fqn,
                outputs=outputs,
                inputs=inputs,
                experts=experts.number,
                transposed=experts.transposed,
                block=experts.block,
                role="experts",
            )
        )
    return tuple(stacks)


def matrices(anatomy: Anatomy) -> tuple[Matrix, ...]:
    """Return every linear layer and every stack of experts, in the order of the model's parameters.

    A head that is tied to the embedding is left out: to train or to adapt it would be to change the embedding as well.
    """
    tied = None if anatomy.head is None else anatomy.head.tied_to
    each = [of_linear(linear) for linear in anatomy.linears if linear.weight != tied]
    for experts in anatomy.experts:
        each += of_experts(anatomy, experts)
    order = {name: i for i, name in enumerate(anatomy.parameters)}
    return tuple(sorted(each, key=lambda matrix: order[matrix.weight]))


def all_linear(anatomy: Anatomy) -> tuple[Matrix, ...]:
    """Return what the setting `all-linear` means: matrices of attention, MLP and experts in the blocks, no routers."""
    return tuple(m for m in matrices(anatomy) if m.block is not None and m.role in ADAPTED)
