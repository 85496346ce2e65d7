from treering.memory.forecast import Forecast, Peak, Subject, forecast

__all__ = ["Forecast", "Peak", "Subject", "forecast"]
