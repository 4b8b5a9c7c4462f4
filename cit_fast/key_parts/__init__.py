"""Key parts of an instruction and their information gain: what KPIG's replay and KPIG's loss both stand on."""
