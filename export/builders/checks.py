"""Validation of a graph before a target builds it."""

from __future__ import annotations

from pathlib import Path

from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import GraphsError

__all__ = ["check_graph"]


def check_graph(graph: Path, description: EngineGraph) -> None:
    """Check that a file is a valid ONNX model with the tensors of its description and finite weights.

    Raises:
        GraphsError: names the file and the tensor.
    """
    import numpy as np
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # the errors of protobuf and of the checker have no common base
        raise GraphsError(f"{graph} is not a valid ONNX model: {str(error).splitlines()[0]}") from error
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    for weight in (*model.graph.initializer, *constants):
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype.kind not in "iub" and not np.isfinite(values.astype(np.float32)).all():
            raise GraphsError(f"{graph}: {weight.name or 'a constant'} is not finite: export a checkpoint that is")
    for side, tensors, described in (
        ("input", model.graph.input, description.inputs),
        ("output", model.graph.output, description.outputs),
    ):
        found = {}
        for tensor in tensors:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name
            found[tensor.name] = (dtype, tuple(d.dim_value for d in tensor.type.tensor_type.shape.dim[1:]))
        for spec in described:
            if found.get(spec.name) != (spec.dtype, spec.shape):
                raise GraphsError(
                    f"{graph}: {side} {spec.name} is {found.get(spec.name)} in the graph, "
                    f"{(spec.dtype, spec.shape)} in the description: export the graphs again"
                )
