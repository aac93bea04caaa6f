"""What happened: events as plain records, the recorder, the merged trace. No torch."""
