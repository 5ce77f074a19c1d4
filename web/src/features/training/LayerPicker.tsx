import { Button, TextInput } from '@mantine/core';
import { useMemo, useRef } from 'react';
import { useTranslation } from 'react-i18next';
import css from './LayerPicker.module.css';
import { parseLayers, toggle, writeLayers } from './layers';

interface Props {
  n: number;
  value: string;
  onChange: (value: string) => void;
  error?: string | undefined; // what the gpu says of it
}

const NONE: ReadonlySet<number> = new Set();

/** The stack of layers, to click or to type; both always show the same. */
export function LayerPicker({ n, value, onChange, error }: Props) {
  const { t } = useTranslation();
  const clicked = useRef<number | null>(null);
  const parsed = useMemo(() => parseLayers(value, n), [value, n]);
  const chosen = parsed.ok ? parsed.layers : NONE;
  const problem = parsed.ok ? error : t(`training.layers_${parsed.reason}`, { item: parsed.item, last: n - 1 });
  const quarter = Math.max(1, Math.round(n / 4));
  const presets = [
    { text: 'all', label: t('training.preset_all') },
    { text: `last:${quarter}`, label: t('training.preset_last', { n: quarter }) },
    { text: `last:${2 * quarter}`, label: t('training.preset_last', { n: 2 * quarter }) },
    { text: `first:${quarter}`, label: t('training.preset_first', { n: quarter }) },
  ];
  return (
    <div className={css.picker}>
      <TextInput
        label={t('training.layers')}
        description={t('training.layersText')}
        value={value}
        onChange={(event) => onChange(event.currentTarget.value)}
        error={problem}
        spellCheck={false}
        autoComplete="off"
        maxLength={500}
      />
      <div className={css.presets}>
        {presets.map(({ text, label }) => (
          <Button
            key={text}
            size="compact-sm"
            variant={value === text ? 'light' : 'default'}
            onClick={() => onChange(text)}
          >
            {label}
          </Button>
        ))}
      </div>
      <div className={css.ends} aria-hidden="true">
        <span>{t('training.input')} →</span>
        <span>→ {t('training.output')}</span>
      </div>
      <div className={css.stack} role="group" aria-label={t('training.layers')}>
        {Array.from({ length: n }, (_, layer) => (
          <button
            key={layer}
            type="button"
            className={css.layer}
            aria-pressed={chosen.has(layer)}
            aria-label={t('training.layer', { n: layer })}
            onClick={(event) => {
              onChange(writeLayers(toggle(chosen, layer, event.shiftKey ? clicked.current : null), n));
              clicked.current = layer;
            }}
          >
            {layer}
          </button>
        ))}
      </div>
    </div>
  );
}
