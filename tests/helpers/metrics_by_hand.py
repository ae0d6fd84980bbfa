"""Reference implementations of the metrics of a step."""

import reference


def dot(x, y):
    return sum(float((x[n] * y[n]).sum()) for n in x)


def by_hand(method, loss, theta, strength=1.0):
    """Compute all metrics that are defined for a method, as directly as possible."""
    g, c = reference.plain(loss, theta), method.constants
    norm = reference.norm(g)
    size = strength * c.get("gamma", c.get("rho"))
    values = {"grad_norm": norm}
    kind = method.by_hand
    normalized = kind in (reference.norm_penalty, reference.sam)
    if kind is not reference.asam:
        values["penalty"] = size * norm if normalized else size / 2 * norm**2
    scheme = c.get("scheme", "forward")
    if kind is reference.asam:
        t = {n: p.detach().abs() + c.get("eta", 0.0) for n, p in theta.items()}
        scaled = reference.unit({n: t[n] * g[n] for n in g})
        d = {n: t[n] * scaled[n] for n in g}
    else:
        d = reference.unit(g) if normalized else g
    step = c.get("epsilon", size) * (-1 if scheme == "backward" else 1)
    there = reference.combine(1.0, theta, step, d)
    g1 = reference.plain(loss, there)
    if scheme != "exact":
        values["loss_perturbed"] = float(loss(there))
        values["sharpness"] = float(loss(there) - loss(theta))
    if scheme in ("forward", "backward"):
        values["grad_norm_perturbed"] = reference.norm(g1)
        values["alignment"] = dot(g, g1) / norm / reference.norm(g1)
    if scheme == "exact":
        values["curvature"] = dot(g, reference.hessian_times(loss, theta, g)) / norm**2
    elif kind is not reference.asam:
        length = abs(step) if normalized else abs(step) * norm
        other = reference.plain(loss, reference.combine(1.0, theta, -step, d)) if scheme == "central" else g
        values["curvature"] = dot(g, reference.combine(1.0, g1, -1.0, other)) / norm / length
        values["curvature"] *= (0.5 if scheme == "central" else 1.0) * (1 if step > 0 else -1)
    return values
