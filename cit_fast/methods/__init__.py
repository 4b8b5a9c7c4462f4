"""Methods: a method is a choice of four parts, router, replay policy, objective and update, made for each stage."""
