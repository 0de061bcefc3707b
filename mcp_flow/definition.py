"""What a workflow is: its name, description and typed input and output; and how values go to JSON and back.

Annotations are resolved when they are first needed, because a file may name a type before it defines it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial, partialmethod
from types import FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import (
    Annotated,
    Any,
    Generic,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)
from weakref import WeakKeyDictionary

from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_json

from mcp_flow.errors import BrokenWorkflow, InvalidInput
from mcp_flow.rails import Rails

P = ParamSpec("P")
R = TypeVar("R")

MISSING = inspect.Signature.empty
"""The annotation of a function that has none, or none that says how its values look in JSON."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_BYTES = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
_SCALARS = frozenset({NoneType, bool, int, str})


@dataclass(frozen=True, eq=False)
class Workflow(Generic[P, R]):
    """An async function that runs as a workflow. Calling it calls the function, as a test would."""

    fn: Callable[P, Coroutine[Any, Any, R]]
    name: str
    description: str
    file: str
    line: int
    rails: Rails

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """The coroutine of the function itself; nothing is journaled unless its `Flow` journals it."""
        return self.fn(*args, **kwargs)

    @cached_property
    def input_schema(self) -> dict[str, Any]:
        """The JSON Schema of the input, always of an object; raises `BrokenWorkflow`."""
        schema = self._describe(TypeAdapter(self._input.model), "validation")
        if self._input.closed:
            schema["additionalProperties"] = False
        return {"type": "object"} | schema

    @cached_property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the output; None when the annotation says nothing about it."""
        adapter = self._output.adapter
        return None if adapter is None else self._describe(adapter, "serialization")

    def validate_input(self, value: Any) -> dict[str, Any]:
        """The input in its normal form, a JSON object with defaults filled in.

        Raises `InvalidInput` with one problem for each bad field.
        """
        given, model = self._read(value)
        normal: dict[str, Any] = model.model_dump(mode="json", by_alias=True, round_trip=True, warnings=False)
        try:
            # Where the dump loses something (a SecretStr, an alias of one direction), the given form is kept.
            return normal if self._read(normal)[1] == model else given
        except InvalidInput:
            return given

    def arguments(self, value: dict[str, Any]) -> dict[str, Any]:
        """The function's keyword arguments, as typed objects, without its `Flow`; raises `InvalidInput`."""
        _, model = self._read(value)
        if self._input.parameter is not None:
            return {self._input.parameter: model}
        return {name: getattr(model, attribute) for attribute, name in self._input.fields.items()}

    def dump_output(self, value: Any) -> Any:
        """What the workflow returned, as JSON; raises `InvalidInput` when that is not what its annotation says."""
        codec, came = self._output, f"{_shown(value)} ({type(value).__name__})"
        if codec.adapter is None:
            try:
                return json.loads(codec.encode(value)[0])
            except ValueError as error:
                raise InvalidInput(f"Workflow {self.name!r} returned {came}: {error}.") from error
        try:
            codec.adapter.validate_python(value, strict=True)
            codec.encode(value)
        except ValueError as error:
            problems = _problems(error) if isinstance(error, ValidationError) else [str(error)]
            raise InvalidInput(
                f"Workflow {self.name!r} returned {came}, but its annotation says {codec.name}. "
                "Return such a value, or mend the annotation:",
                problems,
            ) from error
        return codec.adapter.dump_python(value, mode="json", by_alias=True, warnings=False)

    def load_output(self, value: Any) -> R:
        """A journaled output as the type that the function is annotated with."""
        output: R = self._output.load(value)
        return output

    @cached_property
    def _input(self) -> _Input:
        parameters = list(inspect.signature(self.fn).parameters.values())[1:]
        hints = {p.name: self._resolve(p.name, p.annotation) for p in parameters}
        if len(parameters) == 1 and _is_model(model := hints[parameters[0].name]):
            return _Input.of_model(model, parameters[0])
        try:
            return _Input.of_fields(self.name, parameters, hints)
        except (PydanticUserError, NameError) as error:
            raise self._broken(f"its parameters can't be read from JSON: {_first_line(error)}") from error

    @cached_property
    def _output(self) -> Codec:
        return codec(_usable(self._resolve("return", inspect.signature(self.fn).return_annotation)))

    @cached_property
    def _early(self) -> dict[str, Any]:
        """Annotations that only the scope around the function could resolve, while it could be seen."""
        return {}

    def _resolve(self, name: str, annotation: Any) -> Any:
        if name in self._early or annotation is MISSING:
            return self._early.get(name, annotation)
        try:
            return _evaluate(annotation, self.fn)
        except Exception as error:  # boundary: an annotation is the author's code
            what = "return value" if name == "return" else f"parameter {name!r}"
            raise self._broken(f"the annotation of its {what} can't be resolved: {error}") from error

    def _read(self, value: Any) -> tuple[dict[str, Any], BaseModel]:
        """The JSON object that was given, and the model that it is."""
        shape, problems = self._input, list[str]()
        try:
            # By way of JSON, as it will be read again: a date in a strict model, say, may be a string only there.
            text = _ENCODER.encode(json.loads(to_json({} if value is None else value, inf_nan_mode="constants")))
            given = json.loads(text)
        except (ValueError, TypeError, PydanticSerializationError, RecursionError) as error:
            raise self._invalid([f"it is not JSON: {_first_line(error)}"]) from error
        if not isinstance(given, dict):
            raise self._invalid([f"it should be a JSON object (got {_shown(value)})"])
        if not given and shape.default is not None:
            return json.loads(shape.default.model_dump_json(by_alias=True, round_trip=True)), shape.default
        if shape.closed:
            problems += [_unknown(name, shape.names) for name in given if name not in shape.names]
        try:
            model = shape.model.model_validate_json(text)
        except ValidationError as error:
            raise self._invalid(_problems(error, closed=shape.closed) + problems) from error
        if problems:
            raise self._invalid(problems)
        return given, model

    def _invalid(self, problems: list[str]) -> InvalidInput:
        return InvalidInput(
            f'The input does not fit workflow {self.name!r}; list_workflows(name="{self.name}") shows its schema:',
            problems,
        )

    def _broken(self, reason: str) -> BrokenWorkflow:
        return BrokenWorkflow(f"{self.file}:{self.line}: workflow {self.name!r}: {reason}")

    def _describe(self, adapter: TypeAdapter[Any], mode: Any) -> dict[str, Any]:
        try:
            return _schema(adapter, mode)
        except (PydanticUserError, PydanticInvalidForJsonSchema, NameError) as error:
            raise self._broken(f"it has no JSON Schema: {_first_line(error)}") from error


@overload
def workflow(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    fn: None = None,
    /,
    *,
    name: str | None = None,
    allow_origins: Sequence[str] = (),
    block_origins: Sequence[str] = (),
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Workflow[P, R]]: ...
def workflow(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    allow_origins: Sequence[str] = (),
    block_origins: Sequence[str] = (),
) -> Any:
    """Marks an async function as a workflow: `@workflow`, or `@workflow(name="…")`.

    Its pages reach only what `allow_origins` names, if it names any, and nothing that `block_origins` does, besides
    what the settings say. A private address is reached only where a pattern names it (see `mcp_flow.rails`).

    Its first parameter is the `Flow`. One further parameter that is a pydantic model is the input; otherwise each
    further parameter is a field of it. Raises `TypeError` or `ValueError` when the function can't be a workflow.
    """
    rails = Rails.of(allow_origins, block_origins)
    if fn is None:
        return lambda fn: _define(fn, name, rails, sys._getframe(1).f_locals)
    return _define(fn, name, rails, sys._getframe(1).f_locals)


def workflows_in(module: ModuleType) -> dict[str, Workflow[..., Any]]:
    """The workflows that a module's own file defines, by name; what it imports belongs to another file."""
    found: dict[str, Workflow[..., Any]] = {}
    for value in vars(module).values():
        if not isinstance(value, Workflow) or value.file != module.__file__:
            continue
        if found.setdefault(value.name, value) is not value:
            lines = sorted((found[value.name].line, value.line))
            raise BrokenWorkflow(
                f"{value.file}:{lines[1]}: workflow {value.name!r} is defined twice, here and in line {lines[0]}; "
                "rename one."
            )
    return found


class Codec:
    """A value's way to JSON and back for one annotation; `adapter` is None for plain JSON."""

    __slots__ = ("_scalars", "adapter", "name")

    def __init__(self, annotation: Any, adapter: TypeAdapter[Any] | None) -> None:
        self.name = "plain JSON" if adapter is None else _type_name(annotation)
        self.adapter = adapter
        self._scalars = _SCALARS if adapter is None else {t for t in _SCALARS if t is annotation}

    def keeps(self, value: Any) -> bool:
        """Whether `value` is the same in JSON as outside of it, so that there is nothing to decode."""
        return self.adapter is None or type(value) in self._scalars

    def encode(self, value: Any) -> tuple[str, Any]:
        """Compact JSON, and the value as a replay will read it from there.

        Raises `ValueError` with the reason when the value does not survive that.
        """
        if type(value) in self._scalars:
            return _encode_scalar(value), value
        if self.adapter is None:
            return _encode_plain(value)
        try:
            text = self.adapter.dump_json(value, by_alias=False, round_trip=True, warnings="none").decode()
        except Exception as error:  # boundary: serializers are the author's code
            raise ValueError(f"it can't be written as {self.name}: {_first_line(error)}") from error
        back = self.decode(text)
        if not _same(back, value):
            raise ValueError(f"as {self.name} it comes back from JSON as {_shown(back)}, not as {_shown(value)}")
        return text, back

    def decode(self, text: str) -> Any:
        """The value that `encode` wrote; raises `ValueError` when the annotation no longer admits it."""
        if self.adapter is None:
            return json.loads(text)
        try:
            return self.adapter.validate_json(text, by_alias=False, by_name=True)
        except ValidationError as error:
            raise ValueError(f"it is no valid {self.name}: {'; '.join(_problems(error))}") from error
        except Exception as error:  # boundary: validators are the author's code
            raise ValueError(f"it can't be read as {self.name}: {_first_line(error)}") from error

    def load(self, value: Any) -> Any:
        """A JSON value from outside as the annotation's type; raises `InvalidInput` with the problems."""
        try:
            text = _encode_plain(value)[0]
            return json.loads(text) if self.adapter is None else self.adapter.validate_json(text)
        except ValidationError as error:
            raise InvalidInput(f"{_shown(value)} is no valid {self.name}:", _problems(error)) from error
        except ValueError as error:
            raise InvalidInput(f"{_shown(value)} is no JSON value: {error}.") from error

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of what `load` takes; empty for plain JSON."""
        return {} if self.adapter is None else _schema(self.adapter, "validation")


def codec(annotation: Any = MISSING) -> Codec:
    """The codec of an annotation; plain JSON when it is missing or pydantic can't make anything of it."""
    try:
        return _codec(annotation)
    except TypeError:  # unhashable metadata in Annotated
        return _make_codec(annotation)


def annotation_of(fn: Callable[..., Any]) -> Any:
    """What a callable says that it returns, strings resolved; `MISSING` when it says nothing that can be used."""
    while True:
        match fn:
            case partial() | partialmethod():
                fn = fn.func
            case MethodType():
                fn = fn.__func__
            case Workflow():
                fn = fn.fn
            case FunctionType():
                break
            case type():
                return _usable(fn)
            case _:
                call = inspect.getattr_static(type(fn), "__call__", None)
                if not isinstance(call, FunctionType):
                    return MISSING
                fn = call
    annotation = fn.__annotations__.get("return", MISSING)
    if annotation is MISSING or (isinstance(annotation, type) and get_origin(annotation) is None):
        return _usable(annotation)
    if fn not in _resolved:
        _resolved[fn] = _resolve_return(fn, annotation)
    return _resolved[fn]


_resolved: WeakKeyDictionary[Callable[..., Any], Any] = WeakKeyDictionary()


# --- workflows ---


@dataclass(frozen=True)
class _Input:
    """The model that reads an input, and how its values become arguments."""

    model: type[BaseModel]
    names: tuple[str, ...]
    closed: bool
    parameter: str | None = None
    default: BaseModel | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_model(cls, model: type[BaseModel], parameter: inspect.Parameter) -> _Input:
        """One parameter that is a model: the input is that model."""
        default = parameter.default if isinstance(parameter.default, BaseModel) else None
        closed = model.model_config.get("extra") != "allow"
        return cls(model, tuple(_accepted_names(model)), closed, parameter.name, default)

    @classmethod
    def of_fields(cls, name: str, parameters: list[inspect.Parameter], hints: Mapping[str, Any]) -> _Input:
        """Each parameter is a field, under an alias because a parameter may be called like a model's own method."""
        fields: dict[str, Any] = {}
        for index, parameter in enumerate(parameters):
            hint, default = hints[parameter.name], parameter.default
            if hint is MISSING:
                hint = Any
            if isinstance(default, FieldInfo):
                hint, default = Annotated[hint, default], MISSING
            fields[f"field{index}"] = (
                hint,
                Field(alias=parameter.name) if default is MISSING else Field(default, alias=parameter.name),
            )
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        names = {attribute: p.name for attribute, p in zip(fields, parameters, strict=True)}
        return cls(model, tuple(names.values()), True, fields=names)


def _define(fn: Callable[..., Any], name: str | None, rails: Rails, local: Mapping[str, Any]) -> Workflow[..., Any]:
    shown = getattr(fn, "__qualname__", repr(fn))
    if not inspect.iscoroutinefunction(fn):
        raise TypeError(
            f"@workflow needs an async function; write `async def {getattr(fn, '__name__', shown)}(flow, …)`."
        )
    parameters = list(inspect.signature(fn).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        raise TypeError(f"Workflow {shown} needs the Flow as its first parameter: `async def {fn.__name__}(flow, …)`.")
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in parameters[1:]:
        if parameter.kind not in keyword:
            raise TypeError(
                f"Workflow {shown} can't take `{parameter}`: its input is JSON with named fields; "
                "give each its own parameter, or take one pydantic model."
            )
    name = fn.__name__ if name is None else name
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} can't be a workflow's name: use 1 to 64 letters, digits, dots, dashes and underscores, "
            "the first a letter or an underscore."
        )
    code = inspect.unwrap(fn).__code__
    made = Workflow(fn, name, inspect.getdoc(fn) or "", code.co_filename, code.co_firstlineno, rails)
    if "<locals>" in fn.__qualname__:
        for parameter in parameters[1:]:
            _resolve_early(made, parameter.name, parameter.annotation, local)
        _resolve_early(made, "return", inspect.signature(fn).return_annotation, local)
    return made


def _resolve_early(made: Workflow[..., Any], name: str, annotation: Any, local: Mapping[str, Any]) -> None:
    try:
        made._early[name] = _evaluate(annotation, made.fn, local)
    except Exception:  # boundary: what is defined further down is resolved when it is needed
        return


def _is_model(annotation: Any) -> bool:
    return (
        isinstance(annotation, type)
        and get_origin(annotation) is None
        and issubclass(annotation, BaseModel)
        and not issubclass(annotation, RootModel)
    )


def _accepted_names(model: type[BaseModel]) -> list[str]:
    """The top-level names that a model reads, aliases included."""
    config, names = model.model_config, list[str]()
    for name, info in model.model_fields.items():
        match info.validation_alias:
            case None:
                names.append(name)
                continue
            case str() as alias:
                names.append(alias)
            case AliasChoices(choices=choices):
                names += [c if isinstance(c, str) else str(c.path[0]) for c in choices]
            case AliasPath(path=path):
                names.append(str(path[0]))
        if config.get("populate_by_name") or config.get("validate_by_name"):
            names.append(name)
    return names


# --- annotations ---


def _evaluate(annotation: Any, fn: Callable[..., Any], local: Mapping[str, Any] | None = None) -> Any:
    """One annotation, strings in it resolved in the function's module and closure, and in `local`."""
    plain = inspect.unwrap(fn)
    names = dict(local or {})
    for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that is still empty
            names[name] = cell.cell_contents
    holder = SimpleNamespace(__annotations__={"it": annotation})
    return get_type_hints(holder, plain.__globals__, names, include_extras=True)["it"]


def _resolve_return(fn: FunctionType, annotation: Any) -> Any:
    try:
        resolved = _evaluate(annotation, fn)
    except Exception:  # boundary: a name that only type checkers see
        return MISSING
    if not inspect.iscoroutinefunction(fn) and _is_awaitable(get_origin(resolved)):
        arguments = get_args(resolved)
        resolved = arguments[-1] if arguments else MISSING
    return _usable(resolved)


def _is_awaitable(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Awaitable)


def _usable(annotation: Any) -> Any:
    return MISSING if annotation is Any or annotation is object or isinstance(annotation, TypeVar) else annotation


def _make_codec(annotation: Any) -> Codec:
    if annotation is MISSING:
        return Codec(annotation, None)
    for config in (_BYTES, None):  # pydantic refuses settings beside a type that has its own, like a model
        with suppress(PydanticUserError, NameError):
            return Codec(annotation, TypeAdapter(annotation, config=config))
    return Codec(MISSING, None)


_codec = lru_cache(maxsize=1024)(_make_codec)


class _Schema(GenerateJsonSchema):
    """Without the titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schema(adapter: TypeAdapter[Any], mode: Any) -> dict[str, Any]:
    schema = adapter.json_schema(mode=mode, schema_generator=_Schema)
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("title", None)
    return schema


# --- JSON ---


def _encode_scalar(value: Any) -> str:
    if isinstance(value, str):
        if not value.isascii():
            _refuse_surrogates(value)
        return _ENCODER.encode(value)
    if value is None:
        return "null"
    return repr(value).lower()


def _encode_plain(value: Any) -> tuple[str, Any]:
    try:
        text = _ENCODER.encode(value)
        _refuse_surrogates(text)
        back = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(_plain_fault(value) or _first_line(error)) from error
    if not _same(back, value):
        raise ValueError(_plain_fault(value) or f"it comes back from JSON as {_shown(back)}")
    return text, back


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("its text holds half of a surrogate pair, which is no character") from error


def _plain_fault(value: Any) -> str | None:
    """What keeps a value from being plain JSON, and where in it that is."""
    try:
        return _find_fault(value, "")
    except RecursionError:
        return "it holds itself, or is nested too deeply"


def _find_fault(value: Any, path: str) -> str | None:
    at = f" at {path.lstrip('.')}" if path else ""
    match value:
        case None | bool() | int():
            return None
        case str():
            try:
                _refuse_surrogates(value)
            except ValueError as error:
                return f"{error}{at}"
            return None
        case float():
            return None if math.isfinite(value) else f"{value}{at} has no JSON form"
        case list() | tuple():
            places = ((f"{path}[{index}]", item) for index, item in enumerate(value))
        case dict():
            for key in value:
                if not isinstance(key, str):
                    return f"a dict key of type {type(key).__name__}{at} ({_shown(key)}); JSON's keys are strings"
            places = ((f"{path}.{key}", item) for key, item in value.items())
        case _:
            return (
                f"a value of type {type(value).__name__}{at} is not plain JSON; "
                "return plain JSON, or annotate what the function returns"
            )
    return next((fault for place, item in places if (fault := _find_fault(item, place))), None)


def _same(back: Any, value: Any) -> bool:
    """Whether nothing was lost, not caring about list or tuple, nor about types that can't be compared."""
    if back == value:
        return True
    if isinstance(back, list | tuple) and isinstance(value, list | tuple):
        return len(back) == len(value) and all(map(_same, back, value))
    if isinstance(back, dict) and isinstance(value, dict):
        return back.keys() == value.keys() and all(_same(back[key], value[key]) for key in back)
    uncomparable = inspect.getattr_static(type(value), "__eq__") is object.__dict__["__eq__"]
    return uncomparable and type(back) is type(value)


# --- words ---


def _problems(error: ValidationError, *, closed: bool = False) -> list[str]:
    """One line for each bad field; with `closed`, unknown top-level fields are left to the caller."""
    lines = []
    for detail in error.errors(include_url=False, include_context=False):
        place, message = _place(detail["loc"]), detail["msg"]
        match detail["type"]:
            case "extra_forbidden" if closed and len(detail["loc"]) == 1:
                continue
            case "extra_forbidden":
                line = f"{place}: there is no such field"
            case "missing":
                line = f"{place}: {message}"
            case _:
                line = f"{place or 'the whole'}: {message} (got {_shown(detail['input'])})"
        lines.append(line)
    return lines


def _place(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _unknown(name: str, names: tuple[str, ...]) -> str:
    return f"{name}: there is no such field; " + (f"the fields are {', '.join(names)}" if names else "there are none")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # boundary: the author's __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return "None" if annotation is NoneType else annotation.__name__
    return re.sub(r"[^\W\d][\w·]*\.", "", str(annotation))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
