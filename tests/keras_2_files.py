"""Files of Keras 2.12 to 2.14, made by hand: those versions can be installed no more."""


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
