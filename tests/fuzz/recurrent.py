def lstm_cells():
    pass
lstm_layers = lstm_cells
class LSTMLayer: pass
class LSTMCell: pass
