import { Icon } from '@/components/Icon';
import { Button } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { isOver, type Turn } from './conversation';
import type { Picture } from './generation';
import css from './Pictures.module.css';
import { setSettings, useSettings } from './settings';

/** Pictures on their way: each preview takes the place of the one before it, so that the picture sharpens. */
export function Pictures({ turn }: { turn: Turn }) {
  return (
    <div className={css.grid}>
      {turn.pictures?.map((picture) => (
        <One key={picture.index} picture={picture} turn={turn} />
      ))}
    </div>
  );
}

function One({ picture, turn }: { picture: Picture; turn: Turn }) {
  const { t } = useTranslation();
  const settings = useSettings();
  const { picture: set } = turn.ask;
  const change = (fields: Partial<typeof set>) => setSettings({ picture: { ...settings.picture, ...fields } });
  const facts = [
    t('pictures.factSeed', { seed: picture.seed }),
    t('pictures.factSteps', { count: set.steps }),
    t('pictures.factGuidance', { value: set.guidance }),
    set.scheduler,
    set.start ? t('pictures.factStrength', { value: set.strength }) : null,
    set.negative.trim() ? t('pictures.factNegative', { text: set.negative.trim() }) : null,
  ].filter(Boolean);
  return (
    <figure className={css.figure} data-done={picture.done}>
      <img
        className={css.picture}
        src={picture.src}
        alt={t(picture.done ? 'pictures.alt' : 'pictures.altPreview', { prompt: turn.question })}
      />
      <figcaption className={css.caption}>
        <span>{facts.join(' · ')}</span>
        {picture.done ? (
          <span className={css.actions}>
            <Button
              component="a"
              href={picture.src}
              download={fileName(turn.question, picture.seed)}
              size="compact-xs"
              variant="subtle"
              color="gray"
              leftSection={<Icon name="download" size={15} />}
            >
              {t('pictures.download')}
            </Button>
            <Button
              size="compact-xs"
              variant="subtle"
              color="gray"
              leftSection={<Icon name="retry" size={15} />}
              onClick={() => change({ seed: picture.seed })}
            >
              {t('pictures.useSeed')}
            </Button>
            <Button
              size="compact-xs"
              variant="subtle"
              color="gray"
              leftSection={<Icon name="edit" size={15} />}
              onClick={() => change({ start: picture.src })}
            >
              {t('pictures.useStart')}
            </Button>
          </span>
        ) : isOver(turn.phase) ? (
          <span>{t('pictures.unfinished')}</span>
        ) : null}
      </figcaption>
    </figure>
  );
}

const fileName = (prompt: string, seed: number): string =>
  `${
    prompt
      .replace(/[^\p{L}\p{N}]+/gu, '-')
      .replace(/^-|-$/g, '')
      .slice(0, 40) || 'picture'
  }-${seed}.png`;
