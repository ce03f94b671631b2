"""Files of Keras 2.12 to 2.14, made by hand: those versions can be installed no more."""

import json

import numpy as np


def as_keras_2(file, layers, doubled):
    """Write the weights of (class in snake case, weights by their place) as Keras 2.12 to 2.14 do.

    2.12 and 2.13 meet a layer with weights twice, so that its second number is left out.
    """
    counts = {}
    for stem, arrays in layers:
        count = counts.get(stem, 0)
        counts[stem] = count + (2 if arrays and doubled else 1)
        place = f"_layer_checkpoint_dependencies/{stem}_{count}" if count else f"_layer_checkpoint_dependencies/{stem}"
        file.create_group(f"{place}/vars")
        for name, array in arrays.items():
            file[f"{place}/{name}"] = array


def as_keras_2_config(model):
    """Return the config of a model of Keras 3 in the words of Keras 2: calls are lists of [layer, call, tensor]."""
    config = dict(model["config"])
    names = {
        layer["config"]["name"] for layer in config["layers"] if layer["class_name"] in ("Functional", "Sequential")
    }

    def tensor(node):
        if isinstance(node, dict):
            node = node["config"]["keras_history"]
            return [node[0], node[1] + (node[0] in names), node[2]]
        return node  # of the outputs, where Keras 3 counts as Keras 2

    def call(layer, node):
        kwargs = {name: value for name, value in node["kwargs"].items() if name != "initial_state"}
        given = node["args"][0]
        if isinstance(given, dict) and "class_name" not in given:
            return {name: [*tensor(item), {}] for name, item in given.items()}
        given = list(given) if isinstance(given, list) else [given]
        if layer["class_name"] == "Add" and len(node["args"]) > 1:  # a + b
            return [*tensor(given[0]), {"y": tensor(node["args"][1]), "name": None}]
        states = node["kwargs"].get("initial_state", [])
        given += states if isinstance(states, list) else [states]
        return [[*tensor(item), kwargs] for item in given]

    layers = []
    for old in config["layers"]:
        layer = dict(old, config=dict(old["config"]))
        if "layers" in layer["config"]:
            layer = as_keras_2_config(layer)
        if "batch_shape" in layer["config"]:
            layer["config"]["batch_input_shape"] = layer["config"].pop("batch_shape")
        if layer["class_name"] == "TimeDistributed" and "layers" in layer["config"]["layer"]["config"]:
            layer["config"]["layer"] = as_keras_2_config(layer["config"]["layer"])
        layer["inbound_nodes"] = [call(old, node) for node in old.get("inbound_nodes", [])]
        if str(old.get("module")).startswith("keras.src.ops"):
            name = old["config"]["name"]
            layer |= {"class_name": "TFOpLambda", "module": "keras", "config": {"name": name, "function": "math.add"}}
        layers.append(layer)
    config["layers"] = layers
    for key in ("input_layers", "output_layers"):
        if key in config:
            found = config[key]
            ends = found.items() if isinstance(found, dict) else None
            single = isinstance(found, list) and isinstance(found[0], str)
            config[key] = dict((k, tensor(v)) for k, v in ends) if ends else [
                tensor(item) for item in ([found] if single else found)
            ]  # fmt: skip
    return model | {"config": config}


def write_old(path, h5py, specs, arrays, version="2.15.0"):
    """Write a model as the .h5 of Keras 2."""
    with h5py.File(path, "w") as file:
        config = {"class_name": "Sequential", "config": {"name": "sequential", "layers": specs}}
        file.attrs["keras_version"], file.attrs["model_config"] = version, json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in arrays]
        for name, values in arrays.items():
            own = group.create_group(name)
            own.attrs["weight_names"] = np.array([f"{name}/w{n}:0".encode() for n in range(len(values))], "S40")
            for n, value in enumerate(values):
                own[f"{name}/w{n}:0"] = value


def old_lstm(**options):
    config = {
        "name": "lstm", "trainable": True, "dtype": "float32", "return_sequences": True, "return_state": False,
        "go_backwards": False, "stateful": False, "filters": 2, "kernel_size": [3, 3], "strides": [1, 1],
        "padding": "same", "data_format": "channels_last", "dilation_rate": [1, 1], "activation": "tanh",
        "recurrent_activation": "hard_sigmoid", "use_bias": True, "unit_forget_bias": True, "dropout": 0.0,
        "recurrent_dropout": 0.0,
    }  # fmt: skip
    return {"class_name": "ConvLSTM2D", "config": config | options}


LSTM_ARRAYS = [np.random.default_rng(1).standard_normal(shape) for shape in ((3, 3, 1, 8), (3, 3, 2, 8), (8,))]
