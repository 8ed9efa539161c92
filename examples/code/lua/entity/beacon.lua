-- namespace Beacon
Beacon = {}

local callbacks = {}

-- Any script may ask to be told when the beacon is switched.
function Beacon.registerCallback(event, callback)
    callbacks[event] = callbacks[event] or {}
    table.insert(callbacks[event], callback)
end

Beacon.registerCallback("onSwitched", function(isOn)
    local entity = Entity()
    entity.title = isOn and "Beacon (active)"%_t or "Beacon"%_t
    entity:setValue("beacon_on", isOn)
end)

function Beacon.interactionPossible(playerIndex, option)
    local player = Player(playerIndex)
    local craft = player.craft
    if not craft then return false, "You're not in a ship."%_t end

    local distance = craft:getNearestDistance(Entity())
    if distance > 100 then
        return false, "You're not close enough to reach the beacon."%_t
    end

    return true
end

function Beacon.initUI()
    local menu = ScriptUI()
    local window = menu:createWindow(Rect(0, 0, 300, 120))
    menu:registerWindow(window, "Switch"%_t)
    window.caption = "Beacon"%_t
    window:createButton(Rect(20, 40, 280, 80), "Switch"%_t, "onSwitchPressed")
end

function Beacon.onSwitchPressed()
    invokeServerFunction("toggle")
end

function Beacon.toggle()
    Beacon.isOn = not Beacon.isOn
    for _, callback in ipairs(callbacks.onSwitched or {}) do
        callback(Beacon.isOn)
    end
end
callable(Beacon, "toggle")
