-- What destroyed ships leave behind.

local Loot = {}
Loot.__index = Loot

local rarities = {"common", "uncommon", "rare", "exotic"}

--- Creates a table of things that may drop.
-- @param seed number that makes the draw repeatable
-- @return a new table without entries
function Loot.new(seed)
    return setmetatable({seed = seed, entries = {}}, Loot)
end

--- Adds something that can drop.
-- @param name what it is
-- @param weight how often it is drawn, against the sum of all weights
function Loot:add(name, weight)
    self.entries[#self.entries + 1] = {name = name, weight = weight}
    return self
end

-- Draws one entry; nil when there is none.
function Loot:draw(random)
    local total = 0
    for _, entry in ipairs(self.entries) do
        total = total + entry.weight
    end

    local rest = random() * total
    for _, entry in ipairs(self.entries) do
        rest = rest - entry.weight
        if rest <= 0 then return entry.name end
    end
end

Loot.rarityOf = function(wave)
    local index = math.min(#rarities, 1 + math.floor(wave / 2))
    return rarities[index]
end

function Loot.drop(entity, wave)
    local rarity = Loot.rarityOf(wave)
    Sector():dropUpgrade(entity.translationf, nil, nil, SystemUpgradeTemplate(rarity))
end

-- Reactions to what happens on board, by the name of the event.
local handlers = {
    -- An opened container gives one thing and is empty afterwards.
    onOpened = function(container, player)
        local name = container.loot:draw(math.random)
        container.loot = Loot.new(container.seed)
        return name
    end,

    onScanned = function(container)
        return #container.loot.entries
    end,
}

local function clamp(value, low, high)
    if value < low then return low end
    if value > high then return high end
    return value
end

Loot.handlers = handlers
Loot.clamp = clamp

return Loot
