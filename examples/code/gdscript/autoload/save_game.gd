extends Node

const PATH := "user://save.json"

signal saved(path: String)
signal load_failed(reason: String)

var _data: Dictionary = {}


# Every node of the group "persist" puts its own part under its path.
func save_all() -> Error:
	for node in get_tree().get_nodes_in_group("persist"):
		if node.has_method("to_save"):
			_data[str(node.get_path())] = node.call("to_save")

	var file := FileAccess.open(PATH, FileAccess.WRITE)
	if file == null:
		return FileAccess.get_open_error()
	file.store_string(JSON.stringify(_data, "\t"))
	saved.emit(PATH)
	return OK


func load_all() -> bool:
	if not FileAccess.file_exists(PATH):
		load_failed.emit("there is no saved game")
		return false

	var parsed: Variant = JSON.parse_string(FileAccess.get_file_as_string(PATH))
	match typeof(parsed):
		TYPE_DICTIONARY:
			_data = parsed
			return true
		_:
			load_failed.emit("the saved game is damaged")
			return false


func _notification(what: int) -> void:
	if what == NOTIFICATION_WM_CLOSE_REQUEST:
		save_all()
		get_tree().quit()


## Runs [param action] once the next frame was drawn.
func after_frame(action: Callable) -> void:
	var run := func() -> void:
		await get_tree().process_frame
		action.call()
	run.call()
