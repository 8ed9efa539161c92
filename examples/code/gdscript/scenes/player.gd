class_name Player
extends CharacterBody2D
## A character that runs, jumps and takes damage.

## Emitted when damage was taken; [param left] is what remains.
signal health_changed(left: int)
signal died

const GRAVITY := 980.0

@export var speed: float = 220.0
@export_range(1, 10) var max_health: int = 5
@export var projectile: PackedScene

var health := max_health:
	set(value):
		health = clampi(value, 0, max_health)
		health_changed.emit(health)

@onready var sprite: AnimatedSprite2D = $AnimatedSprite2D
@onready var _hurt_timer: Timer = %HurtTimer


func _ready() -> void:
	health = max_health
	_hurt_timer.timeout.connect(_on_hurt_timer_timeout)


func _physics_process(delta: float) -> void:
	if not is_on_floor():
		velocity.y += GRAVITY * delta

	var direction := Input.get_axis("move_left", "move_right")
	velocity.x = direction * speed
	sprite.flip_h = direction < 0.0
	move_and_slide()


## Takes damage unless the character was hurt a moment ago.
## Returns whether it counted.
func take_damage(amount: int, from: Node2D = null) -> bool:
	if not _hurt_timer.is_stopped():
		return false

	health -= amount
	if from != null:
		velocity = from.global_position.direction_to(global_position) * speed
	_hurt_timer.start()
	if health == 0:
		died.emit()
	return true


# Waits for the animation before the node goes, so that the last frame is seen.
func _die() -> void:
	set_physics_process(false)
	sprite.play("death")
	await sprite.animation_finished
	queue_free()


@rpc("any_peer", "call_local")
func shoot(direction: Vector2) -> void:
	var shot := projectile.instantiate() as Node2D
	shot.global_position = global_position
	shot.set("direction", direction)
	get_parent().add_child(shot)


func _on_hurt_timer_timeout() -> void:
	sprite.modulate = Color.WHITE


## The speed that is needed to jump this high (pixels).
static func jump_speed(height: float, gravity: float = GRAVITY) -> float:
	return -sqrt(2.0 * gravity * height)


class Inventory extends RefCounted:
	var _items: Dictionary[StringName, int] = {}

	## Adds items of one kind; the new number of them.
	func add(item: StringName, count: int = 1) -> int:
		_items[item] = _items.get(item, 0) + count
		return _items[item]

	func take(item: StringName) -> bool:
		if _items.get(item, 0) == 0:
			return false
		_items[item] -= 1
		return true
