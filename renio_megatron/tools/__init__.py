"""What people ask without training: will it fit, is the machine fit, what does FP8 do; reports and the quickstart."""
