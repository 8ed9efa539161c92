extends StaticBody2D

# Godot 3: a door that needs a key.

signal opened(by)

export(NodePath) var key_path
export (float, 0.1, 5.0) var seconds_open = 2.0

onready var _animation = $AnimationPlayer
var is_open = false setget set_open


func _ready():
    $Area2D.connect("body_entered", self, "_on_Area2D_body_entered")


func set_open(value):
    if is_open == value:
        return
    is_open = value
    _animation.play("open" if value else "close")


# Opens for whoever holds the key, and closes again after a while.
func _on_Area2D_body_entered(body):
    if not body.has_method("has_key") or not body.has_key(key_path):
        return
    set_open(true)
    emit_signal("opened", body)
    yield(get_tree().create_timer(seconds_open), "timeout")
    set_open(false)


remotesync func force_open():
    set_open(true)
