"""The forecaster: encoding, network, training, gate, versions, baseline."""
