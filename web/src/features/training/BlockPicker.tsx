import { Button, TextInput } from '@mantine/core';
import { useMemo, useRef } from 'react';
import { useTranslation } from 'react-i18next';
import { parseBlocks, writeBlocks } from './blocks';
import css from './LayerPicker.module.css';
import { toggle } from './layers';

interface Props {
  blocks: readonly string[]; // none while no gpu can say which there are
  value: string;
  onChange: (value: string) => void;
}

const NONE: ReadonlySet<number> = new Set();
const PRESETS = ['all', 'down', 'mid', 'up'] as const;

/** The blocks of a UNet, to click or to type; both always show the same. */
export function BlockPicker({ blocks, value, onChange }: Props) {
  const { t } = useTranslation();
  const clicked = useRef<number | null>(null);
  const parsed = useMemo(() => parseBlocks(value, blocks), [value, blocks]);
  const chosen = parsed.ok ? parsed.layers : NONE;
  return (
    <div className={css.picker}>
      <TextInput
        label={t('pictured.blocks')}
        description={t('pictured.blocksText')}
        value={value}
        onChange={(event) => onChange(event.currentTarget.value)}
        error={
          parsed.ok ? null : t(`pictured.blocks_${parsed.reason}`, { item: parsed.item, blocks: blocks.join(', ') })
        }
        spellCheck={false}
        autoComplete="off"
        maxLength={500}
      />
      <div className={css.presets}>
        {PRESETS.map((side) => (
          <Button
            key={side}
            size="compact-sm"
            variant={value === side ? 'light' : 'default'}
            onClick={() => onChange(side)}
          >
            {t(side === 'all' ? 'training.preset_all' : `pictured.preset_${side}`)}
          </Button>
        ))}
      </div>
      {blocks.length > 0 ? (
        <>
          <div className={css.ends} aria-hidden="true">
            <span>{t('pictured.input')} →</span>
            <span>→ {t('pictured.output')}</span>
          </div>
          <div className={`${css.stack} ${css.named}`} role="group" aria-label={t('pictured.blocks')}>
            {blocks.map((name, at) => (
              <button
                key={name}
                type="button"
                className={css.layer}
                aria-pressed={chosen.has(at)}
                aria-label={t('pictured.block', { name })}
                onClick={(event) => {
                  onChange(writeBlocks(toggle(chosen, at, event.shiftKey ? clicked.current : null), blocks));
                  clicked.current = at;
                }}
              >
                {name}
              </button>
            ))}
          </div>
        </>
      ) : null}
    </div>
  );
}
