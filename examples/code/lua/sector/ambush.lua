package.path = package.path .. ";data/scripts/lib/?.lua"

include("randomext")
include("callable")

local Loot = include("loot")

-- Don't remove or alter the following comment, it tells the game the namespace this script lives in.
-- namespace Ambush
Ambush = {}

local minWaveDelay = 20
local wave = 0
local attackers = {}

--- Called once when the script is attached to the sector.
-- Only the server spawns ships; the client waits for the broadcast.
function Ambush.initialize()
    if onClient() then return end

    local sector = Sector()
    sector:registerCallback("onPlayerEntered", "onPlayerEntered")
    sector:registerCallback("onDestroyed", "onAttackerDestroyed")
end

function Ambush.getUpdateInterval()
    return 5
end

-- Counts down on the server until the next wave is due.
function Ambush.updateServer(timeStep)
    Ambush.elapsed = (Ambush.elapsed or 0) + timeStep
    if Ambush.elapsed < minWaveDelay or #attackers > 0 then return end

    Ambush.elapsed = 0
    Ambush.spawnWave(wave + 1)
end

--[[
    Spawns one wave around the middle of the sector.
    The strength follows the distance to the core, so that
    outer sectors stay playable for small ships.
]]
function Ambush.spawnWave(number)
    wave = number
    local x, y = Sector():getCoordinates()
    local strength = Ambush.waveStrength(x, y, number)

    for i = 1, 2 + number do
        local look = random():getDirection()
        local position = MatrixLookUpPosition(look, vec3(0, 1, 0), look * 900)
        local ship = Ambush.createAttacker(position, strength)
        attackers[#attackers + 1] = ship.index
    end

    broadcastInvokeClientFunction("showWarning", number)
end

---@param x integer sector coordinate
---@param y integer sector coordinate
---@param number integer
---@return number
function Ambush.waveStrength(x, y, number)
    local distance = math.sqrt(x * x + y * y)
    return math.max(1, (500 - distance) / 50) * (1 + number * 0.25)
end

-- Called by the engine: a player who arrives late still sees the warning.
function Ambush.onPlayerEntered(playerIndex)
    if wave == 0 then return end
    invokeClientFunction(Player(playerIndex), "showWarning", wave)
end

function Ambush.onAttackerDestroyed(index, lastDamageInflictor)
    for i, attacker in ipairs(attackers) do
        if attacker == index then
            table.remove(attackers, i)
            Loot.drop(Entity(index), wave)
            break
        end
    end

    if #attackers == 0 and wave >= 3 then
        Ambush.finish()
    end
end

function Ambush.finish()
    Sector():broadcastChatMessage("", ChatMessageType.Information, "The pirates retreat."%_T)
    terminate()
end

-- Written to disk with the sector and handed back when it is loaded again.
function Ambush.secure()
    return {wave = wave, elapsed = Ambush.elapsed, attackers = attackers}
end

function Ambush.restore(data)
    wave = data.wave or 0
    attackers = data.attackers or {}
    Ambush.elapsed = data.elapsed
end
