"""Model servers beside this process: starting them, ending them whatever happens, and talking to them."""
