"""What was done to the model before it was patched: parts frozen, hooked, wrapped, moved, replaced."""

from torch import nn


def layers_of(model):
    base = model.base_model
    for name in ("h", "layers"):
        if hasattr(base, name):
            return getattr(base, name)
    if hasattr(base, "transformer"):
        return base.transformer.layer
    return base.encoder.layer if hasattr(base.encoder, "layer") else base.encoder.albert_layer_groups


def _alone(layer):
    """ALBERT's, out of a group of one."""
    return layer.albert_layers[0] if hasattr(layer, "albert_layers") else layer


def _dense_of(layer):
    """A linear layer that a fused path would not call."""
    layer = _alone(layer)
    if hasattr(layer, "ffn"):
        return getattr(layer.ffn, "lin1", layer.ffn)
    if hasattr(layer, "mlp"):
        return layer.mlp.c_fc if hasattr(layer.mlp, "c_fc") else layer.mlp.Wi
    return layer.intermediate.dense


def _norm_of(layer):
    layer = _alone(layer)
    for name in ("ln_2", "output_layer_norm", "full_layer_layer_norm", "mlp_norm"):
        if hasattr(layer, name):
            return layer, name
    return (layer if hasattr(layer, "LayerNorm") else layer.output), "LayerNorm"


def _activate_by(layer, activation):
    layer = _alone(layer)
    if hasattr(layer, "ffn"):
        (layer if hasattr(layer, "activation") else layer.ffn).activation = activation
    elif hasattr(layer, "mlp"):
        layer.mlp.act = activation
    else:
        layer.intermediate.intermediate_act_fn = activation


def as_it_is(model):
    pass


def frozen_layer(model):
    layers_of(model)[0].requires_grad_(False)


def frozen_encoder(model):
    """The base model, without what its heads add."""
    model.base_model.requires_grad_(False)
    layers_of(model)[-1].requires_grad_(True)


def frozen_but_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def _hidden(out):
    """Some layers hand out a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _with_hidden(out, hidden):
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def looked_at(model):
    """A hook that reads a few rows of a layer's output and changes nothing."""
    layers_of(model)[0].register_forward_hook(
        lambda module, args, out: print(end="" if _hidden(out)[:, 0].sum() < 1e9 else "!")
    )


def scaled_by_a_hook(model):
    layers_of(model)[0].register_forward_hook(lambda module, args, out: _with_hidden(out, _hidden(out) * 1.5))


def mixed_by_a_hook(model):
    """Every token of the next layer sees padding."""
    layers_of(model)[0].register_forward_hook(
        lambda module, args, out: _with_hidden(out, _hidden(out) + 0.5 * _hidden(out).flip(1))
    )


def changed_by_a_pre_hook(model):
    layers_of(model)[1].register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))


def hook_inside(model):
    _dense_of(layers_of(model)[1]).register_forward_hook(lambda module, args, out: out * 0.5)


def pre_hook_inside(model):
    _dense_of(layers_of(model)[0]).register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


class Wrapped(nn.Module):
    """Somebody's layer around a layer: calls it, and mixes its tokens."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        if hasattr(layer, "attention_type"):  # by which ModernBERT chooses the mask
            self.attention_type = layer.attention_type

    def forward(self, hidden, *args, **kwargs):
        out = self.layer(hidden, *args, **kwargs)
        return _with_hidden(out, _hidden(out) + 0.25 * hidden.roll(1, 1))


def wrapped(model):
    layers_of(model)[1] = Wrapped(layers_of(model)[1])


def swapped(model):
    model.config.use_cache = False
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]


def shared(model):
    model.config.use_cache = False
    layers_of(model)[1] = layers_of(model)[0]


def forward_on_the_instance(model):
    module, name = _norm_of(layers_of(model)[1])
    norm = getattr(module, name)
    norm.forward = lambda x: type(norm).forward(norm, x) * 2.0


class MixingNorm(nn.LayerNorm):
    """A LayerNorm by name alone."""

    def forward(self, x):
        return super().forward(x) + x.mean(-2, keepdim=True)


def another_norm(model):
    module, name = _norm_of(layers_of(model)[1])
    norm = getattr(module, name)
    norm.__class__ = MixingNorm


def softmax_over_tokens(model):
    _activate_by(layers_of(model)[1], nn.Softmax(dim=-2))


def relu(model):
    for layer in layers_of(model):
        _activate_by(layer, nn.ReLU())


STRUCTURES = (
    *(as_it_is, frozen_layer, frozen_encoder, frozen_but_biases, looked_at, scaled_by_a_hook, mixed_by_a_hook),
    *(changed_by_a_pre_hook, hook_inside, pre_hook_inside, wrapped, swapped, shared, forward_on_the_instance),
    *(another_norm, softmax_over_tokens, relu),
)
