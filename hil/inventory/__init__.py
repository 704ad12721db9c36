"""What a lab writes down: board types, benches and missions as YAML, checked before anything is touched."""

from hil.inventory.bench import Bench, BenchBoard, load_bench
from hil.inventory.board_type import BoardType, load_board_type
from hil.inventory.mission import Mission, load_mission

__all__ = ["Bench", "BenchBoard", "BoardType", "Mission", "load_bench", "load_board_type", "load_mission"]
