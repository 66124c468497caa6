OP = "simreg"
