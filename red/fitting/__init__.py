"""The fitted start in pieces: a shared down map, its gauge, fitted readers, repairing writers. docs/starts.md has the mathematics.

    least_squares  normal equations accumulated over batches, solved by Cholesky
    shared_map     one map from the teacher's stream to the student's: balanced, then the most explained readout
    massive        directions that the norm needs and no reader hears
    layers         the half layers of a Hugging Face decoder, run one at a time on stored streams
    fit            readers and writers through the depth, from the stream that the student itself produces
    sweeps         documents that the student of one sweep finds hard count more in the next
    resume         the maps of finished half layers in files, so that an interrupted fit goes on
    forecast       time and memory, before it starts
"""

from red.fitting.fit import fit_maps, fit_student
from red.fitting.forecast import Forecast, forecast

__all__ = ["Forecast", "fit_maps", "fit_student", "forecast"]
