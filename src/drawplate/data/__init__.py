"""Text and problems in, a corpus folder out: `drawplate.data.prepare` has the driver."""
