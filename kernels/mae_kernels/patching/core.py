"""Fused forms of other libraries' modules, put in and taken out instance by instance.

A module is fused by giving it a class made of its own class and of a mixin that replaces some methods and computes the
same from the same parameters and submodules. So its state dictionary, hooks, parameters and place in the model stay,
``isinstance`` holds, and pickling and deepcopy work; nothing global changes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mae_kernels._forms import check_impl


class Fused:
    """What every fused class is besides its own class.

    Attributes:
        unfused_class: The class before.
        fusion: The mixin, a subclass of this class.
        fused_impl: Form of the operators; of the instance.
    """

    unfused_class: type[nn.Module]
    fusion: "type[Fused]"
    fused_impl: str

    def _get_name(self) -> str:
        return f"Fused{self.unfused_class.__name__}"  # in the model's printed form

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that is made on the fly is not found by name: pickle and deepcopy are told how to make it again.
        reduced: Any = super().__reduce_ex__(protocol)
        return revive, (self.unfused_class, self.fusion), *reduced[2:]


_fused_classes: dict[tuple[type[nn.Module], type[Fused]], type[nn.Module]] = {}


def fused_class(unfused: type[nn.Module], fusion: type[Fused]) -> type[nn.Module]:
    """Make the class of an instance that is fused: once, and under the name of the class that it was."""
    made = _fused_classes.get((unfused, fusion))
    if made is None:
        members = {
            "__doc__": unfused.__doc__,
            "__module__": unfused.__module__,
            "__qualname__": unfused.__qualname__,  # libraries tell classes by their names, and save these
            "unfused_class": unfused,
            "fusion": fusion,
        }
        made = type(unfused.__name__, (fusion, unfused), members)
        _fused_classes[unfused, fusion] = made
    return made


def revive(unfused: type[nn.Module], fusion: type[Fused]) -> Any:
    """Make a fused instance without its state, as pickle asks for."""
    made = fused_class(unfused, fusion)
    return made.__new__(made)


@dataclass(frozen=True)
class Target:
    """A class that has a fused form.

    Attributes:
        name: Qualified name of the class, as ``"timm.models.vision_transformer.Block"``; a bare name is a class that
            users keep in a file of their own, whose module has any name.
        fusion: The mixin; the methods that it defines replace those of the class.
        operators: Of mae_kernels that it calls.
        find_refusal: Says in a few words why an instance cannot be fused, or None.
    """

    name: str
    fusion: type[Fused]
    operators: Sequence[str]
    find_refusal: Callable[[Any], str | None]

    def matches(self, candidate: type) -> bool:
        """Whether the target is this very class."""
        return self.name in (candidate.__name__, f"{candidate.__module__}.{candidate.__qualname__}")

    def _replaced(self) -> Iterator[str]:
        for cls in self.fusion.__mro__[: self.fusion.__mro__.index(Fused)]:
            yield from vars(cls)

    def refuse(self, module: nn.Module) -> str | None:
        """Why a module that is one of the target, or of a subclass, cannot be fused; None if it can."""
        family = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
        owner = next(cls for cls in family if self.matches(cls))
        for name in self._replaced():
            if callable(getattr(owner, name, None)) and getattr(type(module), name) is not getattr(owner, name):
                return f"{type(module).__name__} has a {name} of its own"
            if name in vars(module):
                return f"its {name} was replaced"
        try:
            return self.find_refusal(module)
        except AttributeError as error:
            return f"not as in the version that is known: {error}"


@dataclass(frozen=True)
class Change:
    """What was done, or not, with a module.

    Attributes:
        path: Of the module in the model; empty for the model itself.
        name: Of its class.
        what: Operators that it now calls, or why it was left.
    """

    path: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.path or '(the model)'}: {self.name}: {self.what}"


@dataclass
class Report:
    """What :func:`fuse` or :func:`unfuse` did.

    Attributes:
        replaced: Modules with another class now.
        left: Modules of a known class that stay as they are, and why.
    """

    replaced: list[Change] = field(default_factory=list)
    left: list[Change] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left as they are"]
        lines += [f"replaced {change}" for change in self.replaced]
        lines += [f"left {change}" for change in self.left]
        return "\n".join(lines)


def fuse_targets(model: nn.Module, targets: Sequence[Target], impl: str) -> Report:
    """Fuse whatever in a model is one of the targets; see :func:`mae_kernels.fuse`."""
    check_impl(impl)
    report = Report()
    for path, module in model.named_modules():
        target = find_target(module, targets)
        if target is None:
            continue
        name = type(module).__name__
        reason = "is fused already" if isinstance(module, Fused) else target.refuse(module)
        if reason is not None:
            report.left.append(Change(path, name, reason))
            continue
        module.__class__ = fused_class(type(module), target.fusion)
        module.fused_impl = impl
        report.replaced.append(Change(path, name, ", ".join(target.operators)))
    return report


def find_target(module: nn.Module, targets: Sequence[Target]) -> Target | None:
    """The target that a module is one of, by its class or the nearest class above it."""
    for candidate in type(module).__mro__:
        for target in targets:
            if target.matches(candidate):
                return target
    return None


def unfuse(model: nn.Module) -> Report:
    """Give every fused module of a model its own class back.

    Args:
        model: As :func:`fuse` made it.

    Returns:
        What was replaced; what was left are modules that something else has given another class since, as FSDP2 does.
    """
    report = Report()
    for path, module in model.named_modules():
        if not isinstance(module, Fused):
            continue
        fused: Any = module
        unfused = fused.unfused_class
        if type(fused) is not fused_class(unfused, fused.fusion):
            report.left.append(Change(path, unfused.__name__, "has been given another class since"))
            continue
        fused.__class__ = unfused
        del fused.fused_impl
        report.replaced.append(Change(path, unfused.__name__, "as it was"))
    return report


def find_unexpected(module: nn.Module, expected: Mapping[str, type | tuple[type, ...]]) -> str | None:
    """Say which submodule, whose parameters a fused form would take without calling it, is not a plain one.

    Args:
        module: Whose submodules.
        expected: The exact classes of each, by its name in ``module``, as ``{"attn.qkv": nn.Linear}``.

    Returns:
        A reason to leave the module: another class (an adapter, a quantised layer), or hooks, which would not run.
    """
    for path, classes in expected.items():
        part = module.get_submodule(path)
        allowed = classes if isinstance(classes, tuple) else (classes,)
        if type(part) not in allowed:
            own, names = type(part).__name__, [cls.__name__ for cls in allowed]
            if own in names:  # an adapter's class may have the name of what it stands for
                own = f"{type(part).__module__}.{own}"
            return f"{path} is {own}, expected {' or '.join(names)}"
        if any(hooks_of(part)):
            return f"{path} has hooks, which would not run"
    return None


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """All hooks of a module's own."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, name).values()


def is_plain(part: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a part can still be read instead of called: :func:`find_unexpected` for every call, so without words."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return type(part) is cls and not hooks
