"""The protocol's protobuf messages, made from their published field numbers: no compiler, no generated file.

proto3, package `tinker_public`. They live in a pool of their own, so a client of the protocol may be in this process
as well. It knows names, numbers and types; what the fields mean is `tensors` and `replies`.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "tinker_public"
_ENUMS: dict[str, tuple[str, ...]] = {
    "StopReason": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
    "DType": ("DTYPE_UNSPECIFIED", "DTYPE_FLOAT32", "DTYPE_INT64", "DTYPE_INT32", "DTYPE_BFLOAT16"),
}
_MESSAGES: dict[str, dict[int, str]] = {
    "SampleResponse": {
        1: "repeated SampledSequence sequences", 2: "optional bytes prompt_logprobs",
        3: "optional TopkLogprobs topk_prompt_logprobs", 4: "int32 prompt_cache_hit_tokens",
        5: "optional Tensor target_prompt_logprobs", 6: "optional PromptAltTokens prompt_alt_tokens",
    },
    "PromptAltTokens": {1: "Tensor tokens", 2: "Tensor logprobs"},
    "SampledSequence": {
        1: "StopReason stop_reason", 2: "bytes tokens", 3: "optional bytes logprobs",
        4: "optional TopkLogprobs topk_sampled_logprobs",
    },
    "TopkLogprobs": {1: "bytes token_ids", 2: "bytes logprobs", 3: "uint32 k", 4: "uint32 length"},
    "SparseCsr": {1: "bytes values", 2: "bytes crow_indices", 3: "bytes col_indices"},
    "Tensor": {
        1: "encoding:bytes dense", 2: "encoding:SparseCsr sparse_csr", 3: "DType dtype", 4: "repeated int64 shape",
    },
    "BatchedTensor": {1: "bytes data", 2: "bytes offsets", 3: "DType dtype", 4: "repeated int64 trailing_shape"},
    "ArrayRecord": {1: "string type_tag", 2: "map BatchedTensor fields", 3: "int64 num_datums"},
    "ForwardBackwardOutput": {
        1: "string loss_fn_output_type", 2: "repeated ArrayRecord loss_fn_outputs", 3: "map double metrics",
    },
    "ForwardBackwardRequest": {
        1: "string model_id", 2: "int32 seq_id", 3: "repeated Datum data", 4: "string loss_fn",
        5: "map double loss_fn_config", 6: "bool forward_only", 7: "map LossConfigValue loss_fn_config_v2",
    },
    "LossConfigValue": {1: "value:double number", 2: "value:string text"},
    "Datum": {
        1: "repeated Chunk model_input", 2: "map Tensor loss_fn_inputs",
        3: "repeated ProvenanceSpan model_input_spans", 4: "repeated ProvenanceSpan loss_fn_input_spans",
    },
    "ProvenanceSpan": {1: "span:PromptProvenanceSpan prompt_tokens", 2: "span:SampledProvenanceSpan sampled_tokens"},
    "PromptProvenanceSpan": {1: "string sequence_id", 2: "int64 offset", 3: "int64 length"},
    "SampledProvenanceSpan": {1: "string sequence_id", 2: "int64 offset", 3: "int64 length"},
    "Chunk": {1: "chunk:EncodedTextChunk encoded_text", 2: "chunk:ImageChunk image", 3: "chunk:DmelChunk dmel"},
    "EncodedTextChunk": {1: "bytes tokens"},
    "ImageChunk": {
        1: "bytes data", 2: "string format", 3: "optional int32 expected_tokens",
        4: "optional ImageDimensions override_dimensions",
    },
    "ImageDimensions": {1: "uint32 width", 2: "uint32 height"},
    "DmelChunk": {1: "bytes dmel"},
}  # fmt: skip
"""Message -> number -> `[oneof:|repeated |optional |map ]TYPE NAME`; the key of a map is a string."""

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _Field.TYPE_BYTES, "string": _Field.TYPE_STRING, "bool": _Field.TYPE_BOOL, "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64, "uint32": _Field.TYPE_UINT32, "double": _Field.TYPE_DOUBLE,
}  # fmt: skip


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
        return
    field.type = _Field.TYPE_ENUM if kind in _ENUMS else _Field.TYPE_MESSAGE
    field.type_name = f".{_PACKAGE}.{kind}"


def _add_map(message: Any, field: Any, kind: str) -> None:
    """A map is a repeated nested message of key and value."""
    entry = message.nested_type.add(name="".join(part.capitalize() for part in field.name.split("_")) + "Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), kind)
    field.label, field.type = _Field.LABEL_REPEATED, _Field.TYPE_MESSAGE
    field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"


def _add_message(file: Any, name: str, fields: dict[int, str]) -> None:
    message = file.message_type.add(name=name)
    oneofs: list[str] = []
    optionals = []
    for number, text in fields.items():
        oneof, _, rest = text.rpartition(":")
        *label, kind, field_name = rest.split()
        field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
        if label == ["map"]:
            _add_map(message, field, kind)
            continue
        _set_type(field, kind)
        if label == ["repeated"]:
            field.label = _Field.LABEL_REPEATED
        elif label == ["optional"]:
            optionals.append(field)
        if oneof:
            if oneof not in oneofs:
                message.oneof_decl.add(name=oneof)
                oneofs.append(oneof)
            field.oneof_index = oneofs.index(oneof)
    for field in optionals:
        # A field whose absence can be told is, in proto3, a oneof of its own, after all others.
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{field.name}")


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="tinker_public.proto", package=_PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        _add_message(file, name, fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


MESSAGES: dict[str, Any] = _classes()
DTYPES: dict[str, int] = {name.removeprefix("DTYPE_").lower(): number for number, name in enumerate(_ENUMS["DType"])}
"""`float32`, `int64`, `int32`, `bfloat16` -> number."""
STOP_REASONS: dict[str, int] = {"stop": 0, "length": 1}
