"""The two passes of a rule: gradients at theta, gradients at theta + epsilon, and the rule made of them."""
