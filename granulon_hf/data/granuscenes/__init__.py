"""GranuScenes: scenes of tagged cut-outs, drawn from a seed, with questions at three levels."""
